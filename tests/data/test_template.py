import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedexlora.data.config import CausalLMTask, ClassificationTask
from fedexlora.data.task import prepare_task
from fedexlora.data.template import fill, placeholders
from fedexlora.errors import DataError

ROW = {"instruction": "say {x}", "input": "w1", "output": "w2"}
NAMES = st.text("abc _", min_size=1, max_size=4)
PARTS = st.lists(st.tuples(st.text("ab{} ", max_size=4), NAMES, st.text("x{}", max_size=4)))


@given(PARTS)
def test_a_template_is_texts_and_values_in_order(parts):
    def escaped(text):
        return text.replace("{", "{{").replace("}", "}}")

    template = "".join(f"{escaped(text)}{{{name}}}" for text, name, _ in parts)
    columns = {name: [value] for _, name, value in parts}
    expected = "".join(text + columns[name][0] for text, name, _ in parts)
    assert fill(template, columns, 1) == [expected]
    assert placeholders(template) == tuple(columns) == tuple(dict.fromkeys(placeholders(template)))


def prompts(splits, rows=(ROW,), **fields):
    task = prepare_task(CausalLMTask(**fields), splits(list(rows)))
    return task.texts({key: [row.get(key) for row in rows] for key in rows[0]})


def test_columns_are_named_in_both_templates(splits):
    template = "{{json}} {instruction}/{input}:"
    found = prompts(splits, prompt_template=template, completion_template="<{output}|{input}>")
    assert found == (["{json} say {x}/w1:"], ["<w2|w1>"])


def test_the_two_columns_have_short_names(splits):
    found = prompts(
        splits,
        prompt="instruction",
        completion="output",
        prompt_template="{prompt} {input} {instruction}",
        completion_template="{completion}.",
    )
    assert found == (["say {x} w1 say {x}"], ["w2."])


def test_a_template_may_name_its_column_itself(splits):
    found = prompts(splits, prompt="input", completion="output", prompt_template="a {input}")
    assert found == (["a w1"], ["w2"])


def test_a_value_that_a_template_alone_reads_may_be_missing(splits):
    rows = [ROW, {"instruction": "x", "input": None, "output": "y"}]
    fields = {"prompt": "instruction", "completion": "output"}
    found = prompts(splits, rows, **fields, prompt_template="{prompt}|{input}")
    assert found[0] == ["say {x}|w1", "x|"]
    with pytest.raises(DataError, match="'input': expected a value in every row"):
        prompts(splits, rows, prompt="input", completion="output")


def test_an_unknown_placeholder_names_the_columns(splits):
    config = CausalLMTask(
        prompt="instruction", completion="output", prompt_template="{prompt} {inpt}"
    )
    with pytest.raises(DataError) as caught:
        prepare_task(config, splits([ROW]))
    expected = "{inpt} is no column; there are instruction, input, output"
    assert [fault.endswith(expected) for fault in caught.value.faults] == [True, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_template": '{"q": {prompt}}'}, "prompt_template: "),
        ({"prompt_template": "{prompt} }"}, "a brace of the text itself is written twice"),
        ({"prompt_template": "{prompt} {}"}, "{} is no column's name"),
        ({"prompt_template": "{prompt!r}"}, "{prompt!r} is no column's name"),
        ({"prompt_template": "{prompt:>9}"}, "{prompt:>9} is no column's name"),
        ({"completion_template": "A:"}, "completion_template: expected it to contain {completion}"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(fields, message):
    with pytest.raises(ValidationError) as caught:
        CausalLMTask(prompt="p", completion="c", **fields)
    assert message in str(caught.value)


def test_a_tasks_columns_are_all_that_it_reads():
    config = CausalLMTask(prompt_template="{a}{b}", completion="c", completion_template="{d}{c}")
    assert config.columns == ("c", "a", "b", "d")
    assert CausalLMTask(text="t").columns == ("t",)
    assert ClassificationTask(text=("a", "b"), label="l").columns == ("a", "b", "l")
