"""HTML breaks, entities and escapes as the README documents them, by explicit examples and on real reviews."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotune.data.contents import clean, content_digest, normalised

EXAMPLES = [
    ("A film.<br /><br />A good one.", "A film.\n\nA good one."),
    ("a<br>b<br/>c<BR />d<br  />e", "a\nb\nc\nd\ne"),
    (r"Great food.\n\nBad service.", "Great food.\n\nBad service."),
    (r"one\r\ntwo\tthree", "one\ntwo\tthree"),
    (r"""He said \"no\" and \""left\"".""", 'He said "no" and "left".'),
    (r"a \\ b", r"a \ b"),
    (r"a written-out \\n stays written out", r"a written-out \n stays written out"),
    ("Tom &amp; Jerry &#39;n&#x27; &quot;friends&quot; &lt;3", "Tom & Jerry 'n' \"friends\" <3"),
    ("&amp;lt;br&amp;gt;", "&lt;br&gt;"),  # once only: what was escaped twice is text about escapes
    ("&lt;br /&gt;", "<br />"),
]
KEPT = [
    "", "plain", "a < b and c > d", "<b>bold</b>", "<broken", "AT&T", "R&D; and more", r"C:\Users\_x", r"\- \! \s",
    "a & b;", "&unknownname;",
]  # fmt: skip


@pytest.mark.parametrize(("written", "meant"), EXAMPLES)
def test_breaks_entities_and_escapes_become_what_they_mean(written, meant):
    assert clean(written) == meant


@pytest.mark.parametrize("text", KEPT)
def test_anything_else_is_left_alone(text):
    assert clean(text) == text


@given(st.text(alphabet=st.characters(exclude_characters="<\\&", exclude_categories=["Cs"])))
def test_a_text_without_marks_is_never_touched(text):
    assert clean(text) == text


def test_real_reviews_lose_their_breaks_and_nothing_else(shared_data):
    lines = (shared_data / "imdb" / "train.jsonl").open(encoding="utf-8")
    texts = [text for line in lines if "\\" not in (text := json.loads(line)["text"])]
    broken = [text for text in texts if "<br />" in text]
    assert len(broken) > 2800
    assert all(clean(text) == text.replace("<br />", "\n") for text in texts)


@pytest.mark.parametrize(
    "other",
    ["the CAFÉ is closed.", "The  cafe\u0301 is\nclosed. ", "The café<br />is closed.", r"The café\nis closed.",
     "The café&nbsp;is closed."],
)  # fmt: skip
def test_two_spellings_of_a_text_are_the_same_text(other):
    assert content_digest(normalised(other)) == content_digest(normalised("The café is closed."))


@pytest.mark.parametrize("other", ["The cafe is closed.", "The café is closed", "Thecafé is closed."])
def test_another_word_or_mark_is_another_text(other):
    assert content_digest(normalised(other)) != content_digest(normalised("The café is closed."))
