"""What the global model should be, by means that share no code with the product.

For every client a float64 copy of the PEFT model with the client's own configuration; PEFT's own
``get_delta_weight``; the naive weighted sum. The frozen parts that clients hold are not looked at:
the ideal moves by what each client's adapter gained, so that five rounds also show any drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.models import EVERY, base_of, lora_layers

Tensors = Mapping[str, Tensor]


class Oracle:
    """The ideal update of every layer since the untouched base, as the layer stores its weight.

    Args:
        case: the model.
        overrides: for every client, what its LoRA configuration has otherwise than the case's.
        weights: the weight of every client.
        momentum: what of the last round's mean change is added again.
        rate: what the whole is multiplied by.
    """

    def __init__(
        self,
        case: str,
        overrides: Mapping[str, Mapping],
        weights: Mapping[str, float],
        *,
        momentum: float = 0.0,
        rate: float = 1.0,
        **_: object,
    ) -> None:
        self._momentum, self._rate = momentum, rate
        _, options = EVERY[case]
        self._weights = weights
        plain = {"init_lora_weights": True}  # the base's values play no part here
        self._models = {
            client: get_peft_model(
                base_of(case), LoraConfig(**(options | dict(override) | plain))
            ).double()
            for client, override in overrides.items()
        }
        any_model = next(iter(self._models.values()))
        self._layers = dict(lora_layers(any_model))
        self.update = {
            name: torch.zeros_like(layer.get_base_layer().weight.detach())
            for name, layer in self._layers.items()
        }
        self._velocity = {name: torch.zeros_like(x) for name, x in self.update.items()}

    def stored(self, name: str, live: nn.Module) -> Tensor:
        """The ideal update as ``live`` stores its weight: a quantised Conv1D is a Linear."""
        same = _turned(self._layers[name]) == _turned(live)
        return self.update[name] if same else self.update[name].T

    def delta(self, client: str, tensors: Tensors) -> dict[str, Tensor]:
        """PEFT's update of every layer for a client's factors."""
        found = {}
        for name, layer in lora_layers(self._models[client]):
            a, b = _live(layer, "default")
            a.data = tensors[f"A/{name}"].double().reshape(-1, *a.shape[1:])
            b.data = tensors[f"B/{name}"].double().reshape(b.shape[0], -1, *b.shape[2:])
            found[name] = layer.get_delta_weight("default").detach().clone()
        return found

    def round(self, started: Mapping[str, Tensors], sent: Mapping[str, Tensors]) -> None:
        """Add the weighted mean of what the clients' adapters gained."""
        total = sum(self._weights[client] for client in sent)
        self._velocity = {name: self._momentum * x for name, x in self._velocity.items()}
        for client in sent:
            before, after = self.delta(client, started[client]), self.delta(client, sent[client])
            share = self._weights[client] / total
            for name in self.update:
                self._velocity[name] += share * (after[name] - before[name])
        for name, change in self._velocity.items():
            self.update[name] += self._rate * change

    def averaged(self, sent: Mapping[str, Tensors]) -> float:
        """What the mean of the factors would lose of this round's mean update (equal ranks)."""
        total = sum(self._weights[client] for client in sent)
        any_client = next(iter(sent))
        mean = {
            key: sum(self._weights[c] * sent[c][key].double() for c in sent) / total
            for key in sent[any_client]
        }
        deltas = {client: self.delta(client, sent[client]) for client in sent}
        ideal = {n: sum(self._weights[c] * deltas[c][n] for c in sent) / total for n in self.update}
        product = self.delta(any_client, mean)
        lost = sum(float((ideal[n] - product[n]).square().sum()) for n in ideal)
        return (lost / sum(float(x.square().sum()) for x in ideal.values())) ** 0.5


def applied_update(layer: nn.Module, untouched: Tensor) -> Tensor:
    """What a live layer adds to its untouched weight: the weight's change and active adapters."""
    update = _dense(layer.get_base_layer()) - untouched
    for slot in layer.active_adapters:
        up = dict(layer.lora_B.items()).get(slot)
        if isinstance(up, nn.Identity):  # a dense side weight
            side = layer.lora_A[slot].weight.detach().double() * layer.scaling[slot]
            update += side.T if getattr(layer, "fan_in_fan_out", False) else side
        else:
            update += _delta64(layer, slot)
    return update


def _turned(layer: nn.Module) -> bool:
    return bool(getattr(layer, "fan_in_fan_out", False)) and bool(layer.lora_A)


def untouched_weights(model: PeftModel) -> dict[str, Tensor]:
    """Copies of all frozen weights, dequantised, float64."""
    return {name: _dense(layer.get_base_layer()) for name, layer in lora_layers(model)}


def _delta64(layer: nn.Module, slot: str) -> Tensor:
    """PEFT's own update of one adapter, its factors widened to float64 for the while."""
    live = _live(layer, slot)
    narrow = [parameter.data for parameter in live]
    for parameter in live:
        parameter.data = parameter.data.double()
    try:
        return layer.get_delta_weight(slot).detach().clone()
    finally:
        for parameter, data in zip(live, narrow, strict=True):
            parameter.data = data


def _live(layer: nn.Module, slot: str) -> tuple[nn.Parameter, nn.Parameter]:
    if slot in layer.lora_embedding_A:
        return layer.lora_embedding_A[slot], layer.lora_embedding_B[slot]
    return layer.lora_A[slot].weight, layer.lora_B[slot].weight


def _dense(base: nn.Module) -> Tensor:
    weight = base.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state).detach().double()
    if type(weight).__name__ == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else base.state.SCB
        return weight.data.double() * scale.double()[:, None] / 127
    return weight.detach().double().clone()


def half_ulp(weight: Tensor) -> Tensor:
    """What rounding every entry of a float32 weight once can cost."""
    w = weight.detach().float().abs()
    return (torch.nextafter(w, torch.full_like(w, torch.inf)) - w).double() / 2


def errors(
    model: PeftModel, oracle: Oracle, untouched: Mapping[str, Tensor]
) -> Iterator[tuple[str, float, float]]:
    """By layer: the error of what is applied, and what is allowed; both relative to the update."""
    for name, layer in lora_layers(model):
        ideal = oracle.stored(name, layer)
        error = float((applied_update(layer, untouched[name]) - ideal).norm() / ideal.norm())
        base = layer.get_base_layer().weight
        folded = not torch.equal(_dense(layer.get_base_layer()), untouched[name])
        rounding = float(half_ulp(base).norm() / ideal.norm()) if folded else 0.0
        yield name, error, 1e-6 + rounding
