"""What a row asks a model is what training would have read of it, without its answer."""

import math
from typing import Any

import pytest

from isotune.data.sft.forms import NamedColumns, form_of
from isotune.data.sft.messages import Example
from isotune.data.sft.questions import NULL, question_column, question_of

ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": ASKED}, "hi"),
        ({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]'}, "hi"),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "yo"]}}, "hi"),
        ({"messages": None, "prompt": "hi"}, "hi"),
        ({"Prompt": "hi"}, "hi"),
        ({"instruction": "say", "input": math.nan}, "say"),
        ({"instruction": "say", "input": "hi"}, "say\n\nhi"),
    ],
)
def test_the_question_of_a_row_is_its_last_before_an_answer(row: dict[str, Any], expected: str):
    column = question_column(row, NamedColumns())
    assert column is not None
    asked = question_of(row, column)
    assert not isinstance(asked, str)
    assert [message["content"] for message in asked[0]] == [expected]


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_cell_of_nothing_asks_nothing(nothing):
    row = {"prompt": nothing}
    assert question_of(row, str(question_column(row, NamedColumns()))) == NULL


@pytest.mark.parametrize(
    "named", [NamedColumns(prompt="instruction", completion="output"), NamedColumns("instruction")]
)
def test_an_instruction_that_is_named_is_asked_alone_as_in_training(named: NamedColumns):
    row = {"instruction": "say", "input": "hi", "output": "yo"}
    trained = form_of(tuple(row), named)
    assert trained is not None and question_column(row, named) == "instruction"
    asked = question_of(row, "instruction", is_named=True)
    assert not isinstance(asked, str)
    assert [message["content"] for message in asked[0]] == ["say"]
    content = trained.read(row)
    assert content == "say" or (isinstance(content, Example) and content.messages[:1] == asked[0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
        {"question": "q", "answer": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_every_form_is_asked_with_the_system_and_the_tools_of_its_training(row: dict[str, Any]):
    row |= {"system": "s", "tools": '[{"name": "f"}]'}
    form = form_of(tuple(row), NamedColumns())
    assert form is not None and "not read" not in (form.note or "")
    trained = form.read(row)
    asked = question_of(row, str(question_column(row, NamedColumns())))
    assert isinstance(trained, Example) and not isinstance(asked, str)
    assert trained.tools == asked[1] == ({"name": "f"},)
    assert trained.messages[:-1] == asked[0] and asked[0][0] == {"role": "system", "content": "s"}


def test_a_question_beside_an_image_is_refused_as_in_training():
    for row in ({"conversations": ASKED, "image": "x.jpg"}, {"question": "q", "Images": [{"path": "x.jpg"}]}):
        with pytest.raises(ValueError, match="stands beside the texts, and only texts can be read"):
            question_of(row, str(question_column(row, NamedColumns())))
    row = {"image": "q", "audio": None}
    assert not isinstance(question_of(row, "image", is_named=True), str)


def test_a_text_that_is_laid_out_is_asked_as_it_stands():
    row = {"text": "### Human: q\n### Assistant: a", "system": "s", "tools": '[{"name": "f"}]'}
    assert question_of(row, "text") == (({"role": "user", "content": "q"},), None)
