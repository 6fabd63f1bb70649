"""Names of tensors as other programs write them: brought to PEFT's, or refused in one line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedexlora import aggregate_adapters
from fedexlora.errors import AdapterError
from fedexlora.peft_bridge.adapter_file import open_adapter
from fedexlora.peft_bridge.stored_names import stored_names
from tests.adapters.folders import ideal, load, store, updates
from tests.cli.invoke import fedexlora

START = "base_model.model."
PLAIN = [
    f"{START}model.layers.{layer}.self_attn.q_proj.lora_{letter}.weight"
    for layer in range(2)
    for letter in "AB"
]


def rekey(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({change(key): x for key, x in tensors.items()}, path, metadata={"format": "pt"})


def live(key, name="default"):
    """A key of a live PEFT model's ``state_dict``."""
    return re.sub(r"(lora_[AB])\.", rf"\1.{name}.", key)


CHANGES = {
    "the adapter's name": live,
    "another name of the adapter": lambda key: live(key, "site_1"),
    "torch.compile outside": lambda key: f"_orig_mod.{key}",
    "torch.compile inside": lambda key: key.replace(START, f"{START}_orig_mod."),
    "torch.compile of a layer": lambda key: key.replace(".self.", "._orig_mod.self."),
    "DDP outside": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(START, f"{START}module."),
    "FSDP": lambda key: key.replace("encoder.layer.0", "encoder.layer.0._fsdp_wrapped_module"),
    "checkpointing": lambda key: key.replace(".self.", ".self._checkpoint_wrapped_module."),
    "a trainer's attribute": lambda key: f"model.{key}",
    "PEFT twice": lambda key: START + key,
    "several at once": lambda key: f"module._orig_mod.{live(key)}",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Three adapters with heads, and what PEFT makes of their mean."""
    root = tmp_path_factory.mktemp("plain")
    ranks = ({"r": 3}, {"r": 5, "lora_alpha": 4}, {"r": 2})
    folders = [store(root / f"{i}", "roberta", seed=i, **c) for i, c in enumerate(ranks)]
    return folders, ideal("roberta", folders, [1, 2, 5])


def copied(plain, tmp_path):
    found = []
    for i, folder in enumerate(plain[0]):
        found.append(tmp_path / f"site-{i}")
        found[-1].mkdir()
        for path in folder.glob("adapter*"):
            (found[-1] / path.name).write_bytes(path.read_bytes())
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_the_mean_is_what_peft_would_make_of_plain_names(plain, tmp_path, change):
    folders = copied(plain, tmp_path)
    rekey(folders[1], CHANGES[change])
    done = aggregate_adapters(folders, tmp_path / "mean", weights=[1, 2, 5])
    assert [bool(source.names) for source in done.sources] == [False, True, False]
    found = updates("roberta", tmp_path / "mean")
    for name, wanted in plain[1].items():
        assert float((found[name] - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("named", [".default", ""])
def test_heads_of_a_live_model_are_stored_as_peft_loads_them(plain, tmp_path, named):
    folders = copied(plain, tmp_path)
    for folder in folders:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        for key in [key for key in tensors if "classifier" in key]:
            trained = tensors.pop(key)
            wrapper = f"{START}classifier"
            rest = key.removeprefix(f"{wrapper}.")
            tensors[f"{wrapper}.modules_to_save{named}.{rest}"] = trained
            tensors[f"{wrapper}.original_module.{rest}"] = torch.zeros_like(trained)
        save_file(tensors, path, metadata={"format": "pt"})
    done = fedexlora("aggregate", *folders, "--out", tmp_path / "mean", "--weights", "1,2,5")
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stdout
    assert "frozen copies (original_module)" in done.stdout
    sets = [load_file(folder / "adapter_model.safetensors") for folder in plain[0]]
    model = load("roberta", tmp_path / "mean")
    for name, parameter in model.named_parameters():
        if ".modules_to_save.default." in name:
            key = name.replace("modules_to_save.default.", "")
            wanted = sum(w / 8 * s[key].double() for w, s in zip((1, 2, 5), sets, strict=True))
            torch.testing.assert_close(parameter.double(), wanted, rtol=1e-6, atol=1e-7)


WRONG = {
    "no prefix": (lambda key: key.removeprefix(START), "expected a name that starts with"),
    "half a prefix": (lambda key: key.removeprefix("base_model."), "PEFT would ignore it"),
    "two adapters": (lambda key: live(key, "ab"[".0." in key]), "2 adapters in one file (a, b)"),
    "a mixture": (
        lambda key: f"x.{key}" if ".0." in key else key,
        "names with different starts before base_model.model.: '', 'x.'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_brought_to_its_name_is_one_line(wrong):
    change, message = WRONG[wrong]
    names = stored_names([change(key) for key in PLAIN])
    assert len(names.faults) == 1
    assert message in names.faults[0]


def test_one_tensor_by_two_names_is_refused():
    found = stored_names([*PLAIN, live(PLAIN[0])])
    assert any("are both the tensor" in fault for fault in found.faults)


PARTS = st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])


@given(st.lists(st.tuples(PARTS, st.integers(0, 8)), max_size=4), st.booleans(), st.data())
def test_wrappers_anywhere_are_taken_out(parts, named, data):
    """Whatever wrappers there are, and wherever: the stored name comes back, for every tensor."""
    name = data.draw(st.sampled_from(["default", "site_1", "a-b"]))

    def wrap(key):
        words = (live(key, name) if named else key).split(".")
        for part, place in parts:
            # Not inside of what PEFT puts at the start, nor inside of the factor's own name.
            at = 0 if place < 2 else min(place, len(words) - 3)
            words.insert(at, part)
        return ".".join(words)

    found = stored_names([wrap(key) for key in PLAIN])
    assert not found.faults
    assert found.keys == {key: wrap(key) for key in PLAIN}


def test_the_folder_above_names_the_adapters_below(tmp_path):
    store(tmp_path / "out" / "site_1", "roberta", seed=1)
    with pytest.raises(AdapterError, match=r"but in .*out/site_1: name that folder"):
        open_adapter(tmp_path / "out")


def test_a_head_that_the_settings_name_and_nobody_stored_is_refused(plain, tmp_path):
    folder = copied(plain, tmp_path)[0]
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "modules_to_save": ["lm_head"]}))
    with pytest.raises(AdapterError, match="names 'lm_head', of which nothing is stored"):
        open_adapter(folder)


def converted(folder):
    """The command that the refusal of a pickle says, run by a shell."""
    done = fedexlora("aggregate", folder, "--out", folder.with_name("out"))
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    command = shlex.split(said[said.index("python -c") :])
    return subprocess.run([sys.executable, *command[1:]], capture_output=True, check=False)


def test_the_command_that_converts_a_pickle_works(plain, tmp_path):
    folder = copied(plain, tmp_path)[0].rename(tmp_path / "a site's")
    path = folder / "adapter_model.safetensors"
    before = load_file(path)
    torch.save(before, folder / "adapter_model.bin")
    path.unlink()
    assert converted(folder).returncode == 0
    after = load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Harmful:
    def __reduce__(self):
        return (open, ("harmed", "w"))


def test_the_command_runs_nothing_of_a_pickle(plain, tmp_path, monkeypatch):
    folder = copied(plain, tmp_path)[0]
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Harmful()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert converted(folder).returncode != 0
    assert not (tmp_path / "harmed").exists()
