"""Federations of three clients on one kind of base model each: five rounds of real training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from fedexlora.exchange.layout import adapter_tensors, dense_tensors
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.methods import METHODS, Rule
from fedexlora.methods.rule import ClientRound, Trainables
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.load import load_base, probe_shapes
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.transport import Reply
from tests import models
from tests.exactness.oracle import Oracle, errors, untouched_weights
from tests.models import EVERY, base_of, inputs, lora_layers
from tests.rounds.scripted import WEIGHTS, federation, run_round

ROUNDS = 5
STEPS = 3
ROWS_READ = 64
"""Rows over which is measured what comes out of the layers."""

MODELS = {
    "Llama, grouped-query attention": "llama-gqa",
    "RoBERTa": "roberta",
    "GPT-2, Conv1D": "gpt2",
    "Gemma 2, tied scaled embedding": "gemma2",
    "ViT, Conv2d": "patches",
    "Llama, Embedding and lm_head": "embedding",
}
RANKS: Mapping[str, Mapping[str, dict]] = {
    "equal": {},
    "mixed": {"site-b": {"r": 2, "lora_alpha": 5}, "site-c": {"r": 7, "lora_alpha": 9}},
    "patterns, rsLoRA": {},
}
NEXT = ("mean", "svd", "svd_aligned", "reinit", "keep")
MOMENTUM = {"momentum": 0.6, "rate": 0.7, "momentum_rank": 200}
METHOD_OPTIONS: Mapping[str, Mapping[str, object]] = {"fedavgm": MOMENTUM}
"""Of the methods that are exact, or held to what they add: those that are not the defaults."""
OTHER_METHODS = tuple(
    name
    for name, method in METHODS.items()
    if name != "fedex" and (method.default.exact or name in METHOD_OPTIONS)
)
DTYPES = ("float32", "bfloat16", "float16", "int8", "nf4")
_QUANTISABLE = ("llama-gqa", "roberta", "gpt2", "gemma2", "embedding")
_LINEAR = {
    "llama-gqa": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
    "roberta": {"target_modules": ["query", "value", "dense"]}
    | {"exclude_modules": r".*classifier.*", "modules_to_save": ["classifier"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "gemma2": {"target_modules": ["embed_tokens", "o_proj", "v_proj"]},
    "patches": {"target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}
_TASKS = {"roberta": "SEQ_CLS", "patches": None}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    model: str
    dtype: str
    ranks: str
    next_adapter: str
    placement: str = "auto"
    method: str = "fedex"
    autocast: bool = False
    """Whether clients train, and what comes out is measured, under bfloat16 autocast."""

    def __str__(self) -> str:
        if self.method != "fedex":
            return f"{self.model}-{self.dtype}-{self.method}"
        plain = f"{self.model}-{self.dtype}-{self.ranks.split(',')[0]}-{self.next_adapter}"
        return f"{plain}-autocast" if self.autocast else plain

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(torch.bfloat16) if self.autocast else Arithmetic()

    @property
    def rule(self) -> Rule:
        """What clients and server do."""
        chosen = {"next_adapter": self.next_adapter} if self.method == "fedex" else {}
        return METHODS[self.method].rule_of({**chosen, **METHOD_OPTIONS.get(self.method, {})})

    @property
    def case(self) -> str:
        return f"cell-{self.model}-{self.ranks}"


def cells() -> Iterator[Cell]:
    """A third of all combinations, in which every two values of two kinds still meet.

    A convolution has no quantised form.
    """
    axes = [list(axis) for axis in (MODELS.values(), DTYPES, RANKS, NEXT)]
    for model, dtype, ranks, next_adapter in product(*axes):
        values = (model, dtype, ranks, next_adapter)
        if dtype in ("int8", "nf4") and model not in _QUANTISABLE:
            continue
        if sum(axis.index(value) for axis, value in zip(axes, values, strict=True)) % 3 == 0:
            yield Cell(*values)


def autocast_cells() -> list[Cell]:
    """Every model on every base under bfloat16 autocast, once; float16 does not mix with it."""
    bases = [dtype for dtype in DTYPES if dtype != "float16"]
    every = (Cell(m, d, "equal", "mean", autocast=True) for m in MODELS.values() for d in bases)
    return [x for x in every if x.dtype not in ("int8", "nf4") or x.model in _QUANTISABLE]


def method_cells() -> list[Cell]:
    """Every other method that states what it is held to, on three bases that differ in all."""
    bases = (("gpt2", "float32"), ("llama-gqa", "bfloat16"), ("roberta", "nf4"))
    return [
        Cell(model, dtype, "equal", "mean", method=name)
        for name in OTHER_METHODS
        for model, dtype in bases
    ]


def core() -> list[Cell]:
    """A choice in which every model, precision, mix of ranks and next adapter meets others."""
    every = list(cells())
    chosen = [cell for i, cell in enumerate(every) if i % 8 == 6]
    present = {value for cell in chosen for value in vars(cell).values()}
    assert present >= {*MODELS.values(), *DTYPES, *RANKS, *NEXT}
    return chosen + [x for x in autocast_cells() if x.model in ("llama-gqa", "patches")]


def _options(cell: Cell) -> dict:
    task = _TASKS.get(cell.model, "CAUSAL_LM")
    options = _LINEAR[cell.model] | {"r": 4, "lora_alpha": 7}
    options |= {"task_type": task} if task else {}
    if cell.ranks.startswith("patterns"):
        name = options["target_modules"][-1]
        options |= {"use_rslora": True, "rank_pattern": {name: 3}, "alpha_pattern": {name: 5}}
    return options


_BUILDERS = {
    "llama-gqa": models.llama,
    "roberta": models.roberta,
    "gpt2": models.gpt2,
    "gemma2": models.gemma2,
    "patches": models.vit,
    "embedding": models.llama,
}
for _cell in (*cells(), *autocast_cells(), *method_cells()):
    models.EVERY[_cell.case] = (partial(_BUILDERS[_cell.model], layers=1), _options(_cell))


@dataclass(frozen=True)
class Outcome:
    """What was measured after the last round."""

    error: float
    """The largest error of a layer, relative to its update."""
    share: float
    """The largest error of a layer over what is allowed there."""
    own: float
    """The same error in the models that clients with their own adapters hold."""
    output: float
    """Largest relative error of a layer's output, in float32 arithmetic beside the weight."""
    averaging: float
    """What averaging the factors would have lost of the last round's update; NaN: mixed ranks."""
    records: tuple[RoundRecord, ...]
    placements: str


class Training:
    """Clients that train on tokens or pixels of their own, by AdamW."""

    def __init__(
        self,
        model: AdaptedModel,
        rule: Rule,
        specs: Mapping[str, AdapterSpec],
        arithmetic: Arithmetic,
    ) -> None:
        self.model = model
        self.rule = rule
        self.specs = specs
        self.arithmetic = arithmetic
        self.started: dict[str, dict[str, Tensor]] = {}
        self.sent: dict[str, dict[str, Tensor]] = {}

    def __call__(self, round_: int, client: str, held: GlobalState) -> list[Reply]:
        spec = self.specs.get(client)
        self.model.enter(self._entered(round_, client, held), client, spec)
        self.started[client] = self._tensors()
        with self.model.training_only(self.rule.trains(round_)):
            self._train(1000 * round_ + sum(client.encode()))
        self.sent[client] = self._tensors()
        wanted = self.rule.upload_spec(spec or self.model.spec, round_).tensors()
        update = ClientUpdate(
            client=client,
            round=round_,
            version=held.id,
            num_examples=WEIGHTS[client],
            loss=1.0,
            base=self.model.base_fingerprint,
            tensors={name: self.sent[client][name] for name in wanted},
        )
        return [Reply(client, round_, update.encode())]

    def _entered(self, round_: int, client: str, held: GlobalState) -> GlobalState:
        """What the method has the client start from, instead of the version."""
        if self.rule.client is None:
            return held
        received = Trainables(held.adapter, held.dense)
        fresh = partial(self.model.fresh, self.model.spec, 100 * round_ + sum(client.encode()))
        start = self.rule.client.enter(ClientRound(client, round_, received, {}, fresh))
        return replace(held, adapter=start.factors, dense=start.heads)

    def _tensors(self) -> dict[str, Tensor]:
        return adapter_tensors(self.model.factors()) | dense_tensors(self.model.dense())

    def _train(self, seed: int) -> None:
        peft = self.model.peft_model.train()
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(seed)
        for _ in range(STEPS):
            fed = {k: _redrawn(v, peft.dtype) for k, v in inputs(peft, 4).items()}
            causal = peft.peft_config["default"].task_type == "CAUSAL_LM"
            labels = fed["input_ids"] if causal else torch.randint(0, 3, (4,))
            with self.arithmetic.active(torch.device("cpu")):
                loss = peft(**fed, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def _redrawn(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(x.shape).to(dtype) if x.is_floating_point() else torch.randint_like(x, 2, 90)


def _base(cell: Cell) -> torch.nn.Module:
    if cell.dtype not in ("int8", "nf4"):
        return base_of(cell.case, getattr(torch, cell.dtype))
    task = _TASKS.get(cell.model, "CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        base_of(cell.case).save_pretrained(folder)
        labels = {"num_labels": 3} if task == "SEQ_CLS" else {}
        return load_base(folder, None, task, labels, 0, quantization=cell.dtype)[0]


def play(cell: Cell, rounds: int = ROUNDS) -> Outcome:
    """Run a cell and hold every model that anyone has against the oracle."""
    base = _base(cell)
    options = EVERY[cell.case][1]
    overrides = RANKS[cell.ranks]
    plain = {key: value for key, value in options.items() if key != "task_type"}
    task = options.get("task_type")
    shapes = {c: probe_shapes(base, plain | o, task) for c, o in overrides.items()}
    torch.manual_seed(5)
    peft: PeftModel = get_peft_model(base, LoraConfig(**options))
    untouched = untouched_weights(peft)
    how = cell.arithmetic
    rule = cell.rule
    model = AdaptedModel(peft, rule.factors, cell.placement, [how])
    specs = {client: model.spec.reshaped(shape) for client, shape in shapes.items()}
    training = Training(model, rule, specs, how)
    read = {how: partial(_read, peft, how)}
    parts, state = federation(model, rule, training, specs=specs, forwards=read)
    added = MOMENTUM if cell.method == "fedavgm" else {}
    oracle = Oracle(cell.case, {c: overrides.get(c, {}) for c in WEIGHTS}, WEIGHTS, **added)
    records = []
    for _ in range(rounds):
        state, record = run_round(parts, state)
        oracle.round(training.started, training.sent)
        records.append(record)
    found = list(errors(peft, oracle, untouched))
    output = _output_error(peft, oracle)
    own = 0.0
    for client in state.own:
        model.enter(state, client, specs.get(client))
        own = max([own, *(e for _, e, _ in errors(peft, oracle, untouched))])
    model.enter(state)
    return Outcome(
        error=max(e for _, e, _ in found),
        share=max(e / allowed for _, e, allowed in found),
        own=own,
        output=output,
        averaging=float("nan") if overrides else oracle.averaged(training.sent),
        records=tuple(records),
        placements=records[-1].certificate.placement,
    )


def _read(peft: PeftModel, arithmetic: Arithmetic) -> None:
    """A forward pass over many tokens or images, each time the same."""
    torch.manual_seed(7)
    fed = {k: _redrawn(v, peft.dtype) for k, v in inputs(peft, ROWS_READ).items()}
    with torch.inference_mode(), arithmetic.active(torch.device("cpu")):
        peft.eval()(**fed)


def _output_error(peft: PeftModel, oracle: Oracle) -> float:
    """How far the output of a layer is off that computes in float32 beside an untouched weight."""
    worst = 0.0
    torch.manual_seed(9)
    for name, layer in lora_layers(peft):
        base, ideal = layer.get_base_layer(), oracle.stored(name, layer)
        beside = any(slot != "default" for slot in layer.active_adapters)
        narrow = base.weight.dtype in (torch.bfloat16, torch.float16)
        if not beside or narrow or not layer.lora_A or ideal.ndim != 2:
            continue
        matrix = ideal if type(base).__name__ == "Conv1D" else ideal.T
        x = torch.randn(6, matrix.shape[0])
        with torch.inference_mode():
            added = (layer(x) - layer.base_layer(x)).double()
        wanted = x.double() @ matrix
        worst = max(worst, float((added - wanted).norm() / wanted.norm()))
    return worst
