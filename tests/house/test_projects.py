"""Every command of docs/projects.md is one: its recipe and its flags are read by the command's own parser."""

from pathlib import PurePath

import pytest
from tests.projects_page import PAGE, ROOT, Row, read_page, resolve

from isotune.io.errors import UserError

ROWS = read_page()
ASKED = {  # of each project, by the commands that answer it
    "Prompts with BERT": {"classify", "eval", "predict", "compare", "report", "serve"},
    "Yelp with BERT, Guanaco with OPT-350M": {
        "classify", "sft", "eval", "predict", "compare", "chat", "serve", "export", "sbatch"},
    "IMDb with DistilBERT": {"classify", "eval", "predict", "export", "serve"},
    "IMDb with BERT": {"classify", "eval", "predict", "compare", "ensemble", "report", "serve"},
    "Preferences of the Chatbot Arena": {
        "arena", "eval", "predict", "compare", "ensemble", "validate-submission"},
}  # fmt: skip


def resolved_before(row: Row) -> dict:
    """The recipes that the rows above this one make, by their folders."""
    made: dict = {}
    for other in ROWS[: ROWS.index(row)]:
        resolve(other.words, made)
    return made


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.words)[:60])
def test_a_command_of_the_page_is_read_by_its_own_parser_and_names_what_a_row_above_has_made(row):
    made = resolved_before(row)
    resolve(row.words, made)
    outputs = {word for flag, word in zip(row.words, row.words[1:], strict=False) if flag == "--output"}
    places = {PurePath(place) for place in (*made, *outputs)}
    for file in row.files:
        assert {PurePath(file), *PurePath(file).parents} & places, f"{file} is in no run of the page"
    assert (ROOT / row.test).is_file()


def test_every_project_has_a_command_for_what_it_asks():
    found: dict[str, set[str]] = {}
    for row in ROWS:
        found.setdefault(row.project, set()).add(row.command.removeprefix("isotune "))
    assert found == ASKED


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("classify yelp_bert`", "classify yelp_brt`", "did you mean yelp_bert"),
        ("--label_source random", "--label_source randm", "did you mean random"),
        ("eval runs/yelp_bert`", "eval runs/yelp_berd`", "runs/yelp_berd is made by no row above"),
        ("--task guanaco", "--task guanacoo", "guanacoo"),
        ("--weights fitted --name imdb-test", "--wights fitted --name imdb-test", "wights"),
        ("slurm/sweep.txt", "slurm/swep.txt", "there is no such file"),
        ("--input battles.csv --output", "--input battles.csv --otput", "otput"),
    ],
)
def test_a_mistake_in_a_command_is_found(old, new, sentence):
    text = PAGE.read_text("utf-8")
    assert old in text
    with pytest.raises(UserError, match=sentence):
        made: dict = {}
        for row in read_page(text.replace(old, new)):
            resolve(row.words, made)
