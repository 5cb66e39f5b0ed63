"""What a row asks a model is what training would have read of it, without its answer."""

import math
from typing import Any

import pytest

from isotune.data.sft.forms import NamedColumns
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
