"""A remainder that is held is also applied: in the layers' own arithmetic, kind by kind."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.probes import Probes
from fedexlora.peft_bridge.arithmetic import Arithmetic, float32_products
from fedexlora.peft_bridge.forward import measure_kept, multiplied_image
from fedexlora.peft_bridge.model import REMAINDER, AdaptedModel

ROWS, COLUMNS, VOCABULARY = 320, 192, 3000
"""No weight is square; rounding is noise, which many different outputs average out."""
KERNEL = 3


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        # How PEFT tells 4-bit layers, whose branches it adds in another way.
        self.is_loaded_in_4bit = hasattr(layer, "compute_dtype")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear4bit() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(COLUMNS, ROWS, quant_type="nf4", compute_dtype=torch.bfloat16)
    made.support_avx512bf16_for_cpu = False
    return made


LAYERS = {
    "Linear": lambda: nn.Linear(COLUMNS, ROWS),
    "Conv1D": lambda: Conv1D(ROWS, COLUMNS),
    "Conv2d": lambda: nn.Conv2d(COLUMNS // KERNEL, ROWS, (1, KERNEL)),
    "Embedding": lambda: nn.Embedding(VOCABULARY, ROWS),
    "nf4": linear4bit,
}


def adapted(kind: str, dtype: torch.dtype, **options: object) -> AdaptedModel:
    """A weight of std 0.02, and a trained adapter of std 1e-3 with alpha unlike its rank."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    layer.weight.data = torch.randn_like(layer.weight, dtype=torch.float32) * 0.02
    layer = layer.to("cpu") if kind == "nf4" else layer.to(dtype)
    lora = LoraConfig(r=6, lora_alpha=15, target_modules=["layer"])
    model = AdaptedModel(get_peft_model(OneLayer(layer), lora).eval(), **options)
    module = model.modules["layer"]
    module.load(planted(kind, 6, 1e-3 / module.scaling, 1).value, module.scaling)
    return model


def planted(kind: str, rank: int | None, std: float, seed: int) -> LowRank:
    """A random matrix of that standard deviation, in factors or dense."""
    generator = torch.Generator().manual_seed(seed)
    columns = VOCABULARY if kind == "Embedding" else COLUMNS
    if rank is None:
        return LowRank(std * torch.randn(ROWS, columns, generator=generator))
    a, b = (torch.randn(*shape, generator=generator) for shape in ((rank, columns), (ROWS, rank)))
    return LowRank(Factors(a, b * (std / (b @ a).std())))


def inputs(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "Embedding":
        return torch.randperm(VOCABULARY, generator=generator).reshape(4, -1)
    shape = (128, COLUMNS // KERNEL, 5, 8) if kind == "Conv2d" else (8, 512, COLUMNS)
    return torch.randn(shape, generator=generator).to(dtype)


def exact(kind: str, matrix: Tensor, x: Tensor) -> Tensor:
    """``R x`` in float64, by torch's own operations."""
    if kind == "Embedding":
        return matrix.T[x]
    if kind == "Conv2d":
        kernel = matrix.reshape(ROWS, COLUMNS // KERNEL, 1, KERNEL)
        return nn.functional.conv2d(x.double(), kernel)
    return x.double() @ matrix.T


def autocast(dtype: torch.dtype | None):
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def regression(changed: Tensor, wanted: Tensor) -> float:
    return float((changed * wanted).sum() / wanted.square().sum())


@pytest.mark.parametrize("rank", [12, None], ids=["factors", "dense"])
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_small_remainder_comes_out_of_the_layer(kind, dtype, cast, rank):
    if kind == "nf4" and dtype == torch.float32:
        pytest.skip("its arithmetic is that of its compute dtype")
    if dtype == torch.float16 and (kind != "Linear" or cast):
        pytest.skip("the same sums as in bfloat16, many times slower here")
    model = adapted(kind, dtype, placement="side")
    module, x = model.modules["layer"], inputs(kind, dtype)
    for std, noise in ((1e-3, 1e-3), (1e-4, 3e-3), (1e-5, 1e-2)):
        remainder = planted(kind, rank, std / module.scaling, 3)
        wanted = module.scaling * exact(kind, remainder.dense(), x)
        with torch.no_grad(), autocast(cast):
            module.set_side(REMAINDER, None, module.scaling)
            before = model.peft_model(x)
            module.set_side(REMAINDER, remainder, module.scaling)
            after = model.peft_model(x)
        assert after.dtype == before.dtype
        kept = regression(after.double() - before.double(), wanted)
        assert kept == pytest.approx(1.0, abs=noise)
        if cast is None and dtype == torch.float32:
            assert kept == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "cast"), [("Linear", torch.bfloat16), ("Conv2d", torch.bfloat16), ("nf4", None)]
)
def test_pefts_own_sum_would_lose_it(kind, cast):
    """What the cure is for: without it, most of a small remainder is rounded away."""
    model = adapted(kind, torch.bfloat16, placement="side")
    module, x = model.modules["layer"], inputs(kind, torch.bfloat16)
    remainder = planted(kind, 12, 1e-5 / module.scaling, 3)
    module.set_side(REMAINDER, remainder, module.scaling)
    (wide,) = module.wide_sums
    wide.remove()
    with torch.no_grad(), autocast(cast):
        after = model.peft_model(x).double()
        module.set_side(REMAINDER, None, module.scaling)
        before = model.peft_model(x).double()
    wanted = module.scaling * exact(kind, remainder.dense(), x)
    assert regression(after - before, wanted) < 0.6


def test_a_layer_is_left_as_it_was_once_nothing_is_beside_its_weight():
    kind = "Linear"
    model = adapted(kind, torch.bfloat16, placement="side")
    module = model.modules["layer"]
    hooks = [(x._forward_hooks, x._forward_pre_hooks) for x in (module.layer, module.base)]
    module.set_side(REMAINDER, planted(kind, 12, 1e-3, 3), module.scaling)
    assert any(any(pair) for pair in hooks)
    with pytest.raises(RuntimeError):
        model.peft_model(torch.randn(2, COLUMNS + 1))  # an error inside leaves nothing open
    x = torch.randn(4, COLUMNS).to(torch.bfloat16)
    assert module.base(x).dtype == torch.bfloat16
    module.set_side(REMAINDER, None, module.scaling)
    assert not any(any(pair) for pair in hooks)


@pytest.mark.parametrize("placement", ["side", "fold"])
@pytest.mark.parametrize("rank", [12, None], ids=["factors", "dense"])
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "nf4"])
def test_what_is_measured_is_what_comes_out(kind, rank, placement):
    """The product's regression against one of ours, in bfloat16 autocast on a float32 base."""
    how = Arithmetic(torch.bfloat16)
    model = adapted(kind, torch.float32, placement=placement, arithmetics=[how])
    module, x = model.modules["layer"], inputs(kind, torch.float32)
    remainder = planted(kind, rank, 1e-4 / module.scaling, 3)
    base = module.weight.clone()
    state = model.initial_state()
    model.apply(replace(state, total={"layer": remainder}))

    def forward() -> None:
        with how.active(torch.device("cpu")):
            model.peft_model(x)

    (kept,) = measure_kept(model, {"layer": remainder}, forward).values()
    with torch.no_grad(), autocast(torch.bfloat16):
        after = model.peft_model(x).double()
        if placement == "fold":
            module.weight.data = base
        else:
            module.layer.scaling[REMAINDER] = 0.0
        before = model.peft_model(x).double()
    wanted = module.scaling * exact(kind, remainder.dense(), x)
    slack = 6 * kept.standard_error + 1e-3
    assert kept.share == pytest.approx(regression(after - before, wanted), abs=slack)
    assert kept.standard_error < 0.02


@pytest.mark.parametrize("placement", ["side", "fold"])
@pytest.mark.parametrize("std", [1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_forward_is_the_error_of_the_rounded_operands(kind, std, placement):
    how = Arithmetic(torch.bfloat16)
    model = adapted(kind, torch.float32, placement=placement, arithmetics=[how])
    module = model.modules["layer"]
    weight = module.matrix(module.weight.detach().clone()).double()
    a, b = (x.detach().clone() for x in (module.factors().A, module.factors().B))
    remainder = planted(kind, 12, std / module.scaling, 3)
    state = model.initial_state()
    model.start = {}  # the adapter is what was trained since version 0
    model.apply(replace(state, total={"layer": remainder}))
    s, r = module.scaling, remainder.value

    def narrow(x: Tensor) -> Tensor:
        return x.float().bfloat16().double()

    update = s * (b.double() @ a.double()) + s * remainder.dense()
    if placement == "fold":
        folded = (weight + s * remainder.dense()).float()
        applied = narrow(folded) - narrow(weight) + s * narrow(b) @ narrow(a)
    else:
        applied = s * narrow(r.B) @ narrow(r.A) + s * narrow(b) @ narrow(a)
    expected = float((applied - update).norm() / update.norm())
    found = multiplied_image(model, "layer", how, Probes(None)) - update
    assert float(found.norm()) / float(update.norm()) == pytest.approx(expected, rel=0.02)
    assert expected < 1e-2 if placement == "side" else expected > 0.02


@pytest.mark.parametrize(
    ("arithmetics", "placement"),
    [
        ([Arithmetic()], "fold"),
        ([Arithmetic(torch.bfloat16)], "side"),
        ([Arithmetic(), Arithmetic(torch.float16)], "side"),
        ([Arithmetic(tf32=True)], "side"),
    ],
)
def test_auto_folds_only_where_products_are_float32(arithmetics, placement):
    model = adapted("Linear", torch.float32, arithmetics=arithmetics)
    assert model.placement("layer") == placement


def test_tf32_keeps_ten_bits():
    x = torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 2**-11, 1.0 + 3 * 2**-11, -3.1415927, 0.0, 1e-40])
    found = Arithmetic(tf32=True).operand(x)
    assert found[:4].tolist() == [1.0, 1.0 + 2**-10, 1.0, 1.0 + 2**-9]
    assert bool(((found - x.double()).abs() <= 2**-11 * x.double().abs() + 1e-41).all())
    assert Arithmetic(tf32=True).operand(torch.tensor([torch.inf])).isinf().all()


def test_float32_products_puts_back_what_was_set():
    backends = torch.backends
    torch.set_float32_matmul_precision("medium")
    try:
        before = backends.mkldnn.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
        with float32_products(tf32=False):
            assert backends.mkldnn.matmul.fp32_precision == "ieee"
            assert backends.cudnn.conv.fp32_precision == "ieee"
        after = backends.mkldnn.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
        assert after == before
    finally:
        torch.set_float32_matmul_precision("highest")
