"""Wrong adapters and options: exit code 2, a message that names the place, and no output."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.folders import store, store_all
from tests.cli.invoke import fedexlora

QUERY = "roberta.encoder.layer.0.attention.self.query"


@pytest.fixture
def sites(tmp_path):
    return store_all(tmp_path, "roberta-biases", [{}, {}, {}])


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def key(part):
    return f"base_model.model.{QUERY}.{part}"


def set_value(part, value):
    def change(tensors):
        tensors[key(part)] = value(tensors[key(part)])

    return change


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = torch.nan
    return tensor


def cut_off(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(print))


WRONG = {
    "another base": (
        lambda f: change_config(f, base_model_name_or_path="other"),
        "base_model_name_or_path is 'other', that of",
    ),
    "another task": (lambda f: change_config(f, task_type="CAUSAL_LM"), "task_type is 'CAUSAL_LM'"),
    "no LoRA": (lambda f: change_config(f, peft_type="IA3"), "expected LORA, found 'IA3'"),
    "DoRA": (lambda f: change_config(f, use_dora=True), "use_dora: DoRA's magnitudes divide"),
    "magnitudes": (
        lambda f: change_tensors(
            f, lambda t: t.update({key("lora_magnitude_vector"): torch.ones(24)})
        ),
        "lora_magnitude_vector: a magnitude of DoRA",
    ),
    "experts": (
        lambda f: change_config(f, target_parameters=["experts.gate_up_proj"]),
        "target_parameters: expert weights are not plain products",
    ),
    "an unknown setting": (
        lambda f: change_config(f, use_shiny_new_thing=True),
        "use_shiny_new_thing = True: it is not known to leave the update a product",
    ),
    "PiSSA": (
        lambda f: change_config(f, init_lora_weights="pissa_niter_4"),
        "path_initial_model_for_weight_conversion",
    ),
    "NaN": (
        lambda f: change_tensors(f, set_value("lora_A.weight", with_nan)),
        f"{QUERY}.lora_A.weight holds values that are not finite",
    ),
    "infinity in a bias": (
        lambda f: change_tensors(f, set_value("base_layer.bias", lambda t: t + torch.inf)),
        f"{QUERY}.base_layer.bias holds values that are not finite",
    ),
    "another rank than configured": (
        lambda f: change_config(f, rank_pattern={"layer.0.attention.self.query": 5}),
        f"{QUERY}: adapter_config.json gives it rank 5, its factors have 2",
    ),
    "not targeted": (
        lambda f: change_config(f, target_modules=["value"]),
        f"{QUERY}: target_modules does not cover it",
    ),
    "half a pair": (
        lambda f: change_tensors(f, lambda t: t.pop(key("lora_B.weight"))),
        f"{QUERY}: factor B is missing",
    ),
    "transposed": (
        lambda f: change_tensors(f, set_value("lora_A.weight", lambda t: t.T.contiguous())),
        f"{QUERY}: expected A (r, d_in) and B (d_out, r), found [24, 2] and [24, 2]",
    ),
    "whole numbers": (
        lambda f: change_tensors(f, set_value("lora_A.weight", lambda t: t.long())),
        f"{QUERY}: expected floating-point factors",
    ),
    "another width": (
        lambda f: change_tensors(f, set_value("lora_A.weight", lambda t: t[:, :20].contiguous())),
        f"{QUERY} has factors A [2, 20], B [24, 2], others A [2, 24], B [24, 2]",
    ),
    "a name without PEFT's prefix": (
        lambda f: change_tensors(f, lambda t: t.update({"x.lora_A.weight": torch.ones(2, 4)})),
        "1 of 17 tensors, x.lora_A.weight the first: expected a name that starts with",
    ),
    "a missing bias": (
        lambda f: change_tensors(f, lambda t: t.pop(key("base_layer.bias"))),
        f"{QUERY}.base_layer.bias is missing, which others train",
    ),
    "cut off": (cut_off, "adapter_model.safetensors cannot be read: not a whole safetensors file"),
    "a pickle": (pickled, "adapter_model.bin is a pickle, which can run code and is never loaded"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json can"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    "no rank": (lambda f: change_config(f, r=0), "r: expected a positive number, found 0"),
}


def refused(done, out, *messages):
    assert done.returncode == 2, (done.stdout, done.stderr)
    text = " ".join(done.stderr.split())
    for message in messages:
        assert message in text, text
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert not list(out.parent.glob(".*.tmp"))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", ["aggregate", "deviation"])
def test_adapters_that_do_not_fit_are_named(tmp_path, sites, wrong, command):
    spoil, message = WRONG[wrong]
    spoil(sites[1])
    if command == "deviation" and wrong == "infinity in a bias":
        return  # it reads factors only
    options = ["--out", tmp_path / "out"] if command == "aggregate" else []
    done = fedexlora(command, *sites, *options)
    refused(done, tmp_path / "out", message, "site-2")


def test_other_modules_are_named_with_the_way_out(tmp_path, sites):
    other = store(tmp_path / "other", "roberta-biases", seed=9, target_modules=["query"])
    done = fedexlora("aggregate", *sites, other, "--out", tmp_path / "out")
    refused(done, tmp_path / "out", "value, roberta.encoder.layer.1", "--allow-missing")


def test_all_faults_are_said_at_once(tmp_path, sites):
    change_config(sites[0], use_dora=True)
    cut_off(sites[2])
    done = fedexlora("aggregate", *sites, tmp_path / "none", "--out", tmp_path / "out")
    refused(done, tmp_path / "out", "use_dora", "not a whole", "none: there is no such folder")


def test_adapters_that_name_one_base_differently(tmp_path, sites):
    change_config(sites[1], base_model_name_or_path="/data/the-base")
    done = fedexlora("aggregate", *sites, "--out", tmp_path / "out", "--base", "org/base")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1,2"], "expected 3, one for each adapter, found 2"),
        (["--weights", "1,0,2"], "weight 2: expected a positive number, found 0.0"),
        (["--weights", "1,-1,2"], "weight 2: expected a positive number, found -1.0"),
        (["--weights", "1,nan,2"], "weight 2: expected a positive number, found nan"),
        (["--weights", "1,x,2"], "'x' is not a number"),
        (["--rank", "0"], "--rank: expected at least 1, found 0"),
        (["--tolerance", "1.5"], "--tolerance: expected at least 0 and below 1, found 1.5"),
        (["--rank", "2", "--tolerance", "0.1"], "give it or --rank, not both"),
        (["--method", "magic"], "--method: expected one of fedex, fedit, ffa, rolora, "),
        (["--method", "ffa"], "its A differs between adapters"),
        (["--as", "merged"], "--as merged: expected --base MODEL"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, sites, options, message):
    done = fedexlora("aggregate", *sites, "--out", tmp_path / "out", *options)
    refused(done, tmp_path / "out", message)


def test_an_existing_folder_is_left_as_it_is(tmp_path, sites):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    done = fedexlora("aggregate", *sites, "--out", out)
    assert done.returncode == 2
    assert "already exists" in done.stderr
    assert [p.name for p in out.iterdir()] == ["precious"]


def test_a_full_disk_leaves_nothing(tmp_path, sites):
    """The system refuses to write more than a few bytes of a file, as a full disk would."""
    code = (
        "import resource, signal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from fedexlora.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); main()"
    )
    out = tmp_path / "out"
    words = ["aggregate", *map(str, sites), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    refused(done, out, "cannot be written: File too large")


def test_pictures_of_unknown_kinds_are_refused_before_the_work(tmp_path, sites):
    done = fedexlora("deviation", *sites, "--plot", tmp_path / "map.gif")
    refused(done, tmp_path / "map.gif", "expected a name that ends with .png, .svg, .pdf")
