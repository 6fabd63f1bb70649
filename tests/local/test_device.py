"""One device, stated: with several GPUs in sight `Trainer` gets the one that is named."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import PartialState
from torch import nn

from fedexlora.errors import RecipeError
from fedexlora.local.arguments import arguments, training_faults
from fedexlora.local.trainer import _Trainer
from fedexlora.peft_bridge import load
from fedexlora.peft_bridge.device import find_device
from fedexlora.rounds.observer import Observer, RunInfo
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run


@pytest.fixture
def gpus(monkeypatch):
    """Have torch say that there are so many GPUs; they cannot be used."""
    chosen = []

    def see(count: int, kind: str = "cuda") -> list[torch.device]:
        seen = torch.device(kind) if count else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: seen)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        if kind == "cuda":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
            monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return see


@pytest.mark.parametrize(
    ("count", "name", "found"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (1, "auto", "cuda:0"),
        (1, "cuda", "cuda:0"),
        (4, "cuda:0", "cuda:0"),
        (4, "cuda:3", "cuda:3"),
        (4, "cpu", "cpu"),
    ],
)
def test_a_device_is_the_one_that_is_named_or_the_only_one(gpus, count, name, found):
    gpus(count)
    assert str(find_device(name)) == found


@pytest.mark.parametrize(
    ("count", "name", "fault"),
    [
        (4, "auto", "auto could be any of 4 devices"),
        (2, "cuda", "cuda could be any of 2 devices"),
        (2, "cuda:2", "cuda:2 is asked for, and there is cuda:0, cuda:1"),
        (1, "mps", "mps is asked for, and there is cuda:0"),
        (0, "cuda", "cuda is asked for, and there is the processor alone"),
        (0, "mps", "mps is asked for, and there is the processor alone"),
    ],
)
def test_a_device_that_is_not_there_or_could_be_several_is_refused(gpus, count, name, fault):
    gpus(count)
    with pytest.raises(RecipeError, match=r"--set training\.device=") as refused:
        find_device(name)
    assert fault in str(refused.value)
    # The recipe itself is right: on another machine there may be such a device.
    assert training_faults({"device": name}) == []


def test_the_accelerator_of_another_maker_is_found(gpus):
    gpus(1, "mps")
    assert find_device("auto").type == find_device("mps").type == "mps"
    with pytest.raises(RecipeError, match="training.device=mps"):
        find_device("cuda:0")


class Unmoved(nn.Linear):
    """A model that says it is wherever it is sent."""

    def to(self, *args: object, **options: object) -> Unmoved:
        self.sent = args or options
        return self


def test_trainer_sees_the_named_gpu_alone(gpus, tmp_path):
    chosen = gpus(4)
    options = {"device": "cuda:2", "per_device_train_batch_size": 3}
    made = arguments(options, seed=0, folder=str(tmp_path))
    assert (str(made.device), made.n_gpu, made.train_batch_size) == ("cuda:2", 1, 3)
    assert PartialState().device == torch.device("cuda:2")
    assert set(chosen) == {torch.device("cuda:2")}, "no context is made on another GPU"
    model = Unmoved(3, 2)
    trainer = _Trainer(None, model=model, args=made, train_dataset=[])
    assert model.sent[0] == torch.device("cuda:2")
    assert trainer.accelerator.device == torch.device("cuda:2")
    assert trainer._wrap_model(model) is model, "no nn.DataParallel"


def test_with_use_cpu_no_gpu_is_touched(gpus, tmp_path):
    chosen = gpus(4)
    for options in ({"use_cpu": True}, {"device": "cpu"}, {"use_cpu": True, "device": "auto"}):
        made = arguments(options, seed=0, folder=str(tmp_path))
        assert (str(made.device), made.n_gpu, made.use_cpu) == ("cpu", 0, True)
    assert chosen == []


def test_a_run_that_could_be_on_several_gpus_is_refused_before_it_is_written(
    document, tmp_path, gpus
):
    gpus(2)
    del document["training"]["use_cpu"]
    with pytest.raises(RecipeError, match="auto could be any of 2 devices"):
        run(parse_recipe(document, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_states_its_device_once_and_may_go_on_elsewhere(document, tmp_path):
    told = []

    class Watch(Observer):
        def started(self, info: RunInfo) -> None:
            told.append(info.device)

    document["federation"]["rounds"] = 1
    run(parse_recipe(document, "test"), tmp_path / "run", observer=Watch())
    assert 'device = "auto"' in (tmp_path / "run" / "recipe.toml").read_text()
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["machine"]["device"] == "cpu"
    document["federation"]["rounds"] = 2
    document["training"]["device"] = "cpu"
    result = run(parse_recipe(document, "test"), tmp_path / "run", resume=True, observer=Watch())
    assert [record.round for record in result.records] == [1, 2]
    assert told == ["cpu", "cpu"]


def test_quantised_weights_are_where_the_recipe_trains(monkeypatch):
    given = {}

    class StopError(Exception):
        """Nothing is loaded."""

    class Loader:
        @staticmethod
        def from_pretrained(source: str, **options: object) -> None:
            given.update(options)
            raise StopError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(load.HEADS, "CAUSAL_LM", Loader)
    for name in ("cpu", "cuda:1"):
        device = torch.device(name)
        with pytest.raises(StopError):
            load.load_base("here", None, "CAUSAL_LM", {}, 0, quantization="nf4", device=device)
        assert given["device_map"] == {"": name}
