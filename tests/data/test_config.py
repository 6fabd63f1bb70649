import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from fedexlora.data.config import CausalLMTask, DataConfig, TaskConfig
from fedexlora.data.partition_config import PartitionConfig

TASK, PARTITION = TypeAdapter(TaskConfig), TypeAdapter(PartitionConfig)


@pytest.mark.parametrize(
    ("given", "headline"),
    [
        ({"kind": "classification", "text": "t"}, "accuracy"),
        ({"kind": "classification", "text": "t", "metrics": ["loss", "f1"]}, "loss"),
        ({"kind": "regression", "text": ["a", "b"]}, "pearson"),
        ({"kind": "regression", "text": "a", "metrics": ["mse"]}, "mse"),
        ({"kind": "causal-lm", "text": "t"}, "loss"),
    ],
)
def test_the_first_metric_is_the_headline(given, headline):
    assert TASK.validate_python(given).headline == headline


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "causal-lm"}, "found none of them"),
        ({"kind": "causal-lm", "prompt": "p"}, "found `prompt`"),
        ({"kind": "causal-lm", "text": "t", "completion": "c"}, "found `text` and `completion`"),
        (
            {"kind": "causal-lm", "prompt": "p", "completion": "c", "prompt_template": "Q:"},
            "expected it to contain {prompt}",
        ),
        ({"kind": "causal-lm", "text": "t", "prompt_template": "a{prompt}"}, "has no effect"),
        ({"kind": "classification", "text": "t", "metrics": ["bleu"]}, "'accuracy', 'f1'"),
        ({"kind": "classification", "text": "t", "metrics": []}, "expected at least one"),
        ({"kind": "classification", "text": "t", "metrics": ["f1", "f1"]}, "each metric once"),
        ({"kind": "classification", "text": "t", "labels": ["a", "a"]}, "each label once"),
        ({"kind": "classification", "text": ["a", "b", "c"]}, "at most 2"),
        ({"kind": "classification", "text": "t", "lable": "x"}, "Extra inputs"),
        ({"kind": "tagging", "text": "t"}, "'classification', 'regression', 'causal-lm'"),
    ],
)
def test_a_wrong_task_is_refused_with_a_reason(given, message):
    with pytest.raises(ValidationError) as caught:
        TASK.validate_python(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "iid", "clients": 0},
        {"kind": "dirichlet", "clients": 2, "alpha": 0},
        {"kind": "dirichlet", "clients": 2, "alpha": float("inf")},
        {"kind": "dirichlet", "clients": 2, "alpha": 1, "min_rows": 0},
        {"kind": "by_column"},
        {"kind": "by_column", "column": "c", "clients": 3},
    ],
)
def test_a_wrong_partition_is_refused(given):
    with pytest.raises(ValidationError):
        PARTITION.validate_python(given)


def test_every_field_is_described():
    for model in (DataConfig, CausalLMTask):
        assert all(field.description for field in model.model_fields.values())


def test_the_configuration_loads_no_heavy_library():
    code = (
        "import sys, fedexlora.data.config as _;"
        "print(sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
