"""What one client sends and receives in a run: the paper's Table 8, and the same of our messages.

    python benchmarks/communication.py

Three clients, five rounds, rank 4. Only shapes matter: the models have no weights, and the factors
are random. Our numbers are counted in the messages that a run would send; the paper's table is
recomputed from the number of parameters. Prints the tables of `docs/paper.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.delivery import deliver
from fedexlora.exchange.history import History
from fedexlora.exchange.layout import unpack_finite
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate, decode_update
from fedexlora.exchange.version import first_id
from fedexlora.methods import METHODS, Method
from fedexlora.rounds.common_update import CommonForm, HeldUpdate
from fedexlora.rounds.reduction import Reducer, WeightedUpdate

CLIENTS, ROUNDS, RANK = 3, 5, 4
PAPER = {
    "RoBERTa-base": {"all weights": 7.032, "fedex": 1.0, "fedit": 0.979, "ffa": 0.972},
    "RoBERTa-large": {"all weights": 10.396, "fedex": 1.0, "fedit": 0.984, "ffa": 0.979},
    "GPT-2": {"all weights": 9.475, "fedex": 1.0, "fedit": 0.917, "ffa": 0.886},
}
"""Table 8 of arXiv:2410.09432: parameters sent, relative to FedEx-LoRA."""


@dataclass(frozen=True)
class Shapes:
    """A model's sizes; the factors of a module are A (RANK, d_in) and B (d_out, RANK)."""

    weights: int
    """All parameters, a classification head among them."""
    modules: Mapping[str, tuple[int, int]]
    """Of the adapted modules, (d_out, d_in)."""
    head: Mapping[str, tuple[int, ...]]
    """Of what is trained whole."""

    @property
    def head_size(self) -> int:
        """Numbers in the head."""
        return sum(map(prod, self.head.values()))

    def factor_size(self, letters: str) -> int:
        """Numbers in the factors of all modules."""
        widths = {"A": 1, "B": 0}
        return sum(RANK * size[widths[x]] for size in self.modules.values() for x in letters)


def models() -> dict[str, Shapes]:
    """The paper's three models, with LoRA where its code puts it."""
    base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    large |= {"intermediate_size": 4096}
    with torch.device("meta"):
        roberta = [
            RobertaForSequenceClassification(RobertaConfig(num_labels=2, **sizes))
            for sizes in (base, base | large)
        ]
        gpt2 = GPT2LMHeadModel(GPT2Config())
    return {
        "RoBERTa-base": shapes(roberta[0], ("query", "value")),
        "RoBERTa-large": shapes(roberta[1], ("query", "value")),
        "GPT-2": shapes(gpt2, ("c_attn", "c_proj")),
    }


def shapes(model: PreTrainedModel, targets: tuple[str, ...]) -> Shapes:
    modules = {}
    for name, module in model.named_modules():
        if name.endswith(targets):
            size = tuple(module.weight.shape)
            modules[name] = size if isinstance(module, torch.nn.Linear) else size[::-1]
    head = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith("classifier")}
    return Shapes(sum(p.numel() for p in model.parameters()), modules, head)


def our_numbers(sizes: Shapes, method: Method) -> tuple[list[int], list[int]]:
    """Numbers in what one client sends and receives, by round."""
    spec = AdapterSpec(
        {n: ModuleSpec(*size, RANK, torch.float32, 1.0) for n, size in sizes.modules.items()},
        {n: TensorSpec(size, torch.float32) for n, size in sizes.head.items()},
        method.default.factors,
    )
    state, history = start(spec), History(ROUNDS)
    up, down, held = [], [], None
    for round_ in range(1, ROUNDS + 1):
        down.append(numel(unpack_finite(deliver(history, state, held).message)[0]))
        held = state.version
        form = CommonForm(state, spec, {})
        counted = []
        for client in range(CLIENTS):
            sent = {name: torch.randn(tensor.shape) for name, tensor in spec.tensors().items()}
            message = ClientUpdate(str(client), round_, state.id, 1, 0.0, "", sent).encode()
            update = decode_update(message, spec, round_, str(client))
            counted.append(WeightedUpdate(HeldUpdate.of(update, form), 1.0))
        up.append(numel(update.tensors))
        sink = history.store.sink(state, method.default.steps(round_))
        step = (
            Reducer(form, method.default, lambda _, now=state: now.adapter)
            .reduce(counted, sink)
            .step
        )
        state, history = state.advance([step]), history.after(step)
    return up, down


def start(spec: AdapterSpec) -> GlobalState:
    """Version 0 with random A."""
    torch.manual_seed(0)
    adapter, total = {}, {}
    for name, module in spec.modules.items():
        a, b = module.factor("A").shape, module.factor("B").shape
        adapter[name] = Factors(torch.randn(a), torch.zeros(b))
        total[name] = LowRank.zeros(module.d_out, module.d_in, torch.float64)
    dense = {name: torch.zeros(tensor.shape) for name, tensor in spec.dense.items()}
    id_ = first_id({"": spec}, "", adapter, dense, {})
    return GlobalState(0, id_, adapter, total, dense)


def numel(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def recomputed(sizes: Shapes, share: float) -> dict[str, float]:
    """The paper's ratios: the model once, and five times what goes up and down.

    The residual travels as factors of rank CLIENTS * RANK beside the mean ones.

    Args:
        sizes: the model.
        share: how much of the model's parameters is counted.
    """
    weights, both, b = sizes.weights * share, sizes.factor_size("AB"), sizes.factor_size("B")
    head = 2 * sizes.head_size
    counted = {
        "all weights": weights + ROUNDS * 2 * weights,
        "fedex": weights + ROUNDS * ((2 + CLIENTS) * both + head),
        "fedit": weights + ROUNDS * (2 * both + head),
        "ffa": weights + ROUNDS * (2 * b + head),
    }
    return {name: numbers / counted["fedex"] for name, numbers in counted.items()}


def paper_table(known: Mapping[str, Shapes]) -> list[str]:
    lines = ["| model | method | paper | recomputed | with half the model's size |"]
    lines.append("|---|---|---:|---:|---:|")
    for model, sizes in known.items():
        whole, half = recomputed(sizes, 1.0), recomputed(sizes, 0.5)
        for name, said in PAPER[model].items():
            cells = f"{said:.3f} | {whole[name]:.3f} | {half[name]:.3f}"
            lines.append(f"| {model} | {label(name)} | {cells} |")
    return lines


def our_table(known: Mapping[str, Shapes]) -> list[str]:
    heads = ["model", "method", "sent", "received", "both, of FedEx-LoRA's", "without the head"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|"]
    for model, sizes in known.items():
        found = {
            name: tuple(map(sum, our_numbers(sizes, METHODS[name])))
            for name in ("fedex", "fedit", "ffa")
        }
        heads_sent = 2 * ROUNDS * sizes.head_size
        whole = sum(found["fedex"])
        for name in ("fedex", "fedit", "ffa"):
            sent, received = found[name]
            both = sent + received
            alone = (both - heads_sent) / (whole - heads_sent)
            cells = f"{sent:,} | {received:,} | {both / whole:.3f} | {alone:.3f}"
            lines.append(f"| {model} | {label(name)} | {cells} |")
    return lines


def label(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


if __name__ == "__main__":
    measured = models()
    print("\n".join([*paper_table(measured), "", *our_table(measured)]))
