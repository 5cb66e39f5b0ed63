"""What a user can get wrong about labelled data costs one sentence, exit status 2, and nothing written."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tests.launching import REPOSITORY, TINY_CLASSIFIER, write_recipe

GOOD = [{"text": f"text number {n}", "label": n % 2} for n in range(6)]
CSV = "text,label\none,0\n"


def changed(row: int, **values) -> list[dict]:
    return [{**one, **values} if number == row else one for number, one in enumerate(GOOD)]


def without(row: int, column: str) -> list[dict]:
    return [{k: v for k, v in one.items() if (number, k) != (row, column)} for number, one in enumerate(GOOD)]


# what the file holds (rows, or the text of a CSV), further keys of the recipe, and what the sentence must name
MISTAKES = {
    "a label beyond K - 1": (changed(3, label=2), {"num_labels": 2}, ["row 4", "class 2", "num_labels is 2: 0 to 1"]),
    "a label below 0": (changed(1, label=-1), {}, ["row 2", "holds -1", "a class is a whole number from 0"]),
    "a label in words": (changed(5, label="good"), {}, ["row 6", "'good'"]),
    "more classes said than there are": (GOOD, {"num_labels": 5}, ["no row of class 2", "num_labels is 5"]),
    "one class only": ([{**row, "label": 1} for row in GOOD], {}, ["every row", "class 1", "nothing to tell apart"]),
    "no column of texts": (without(0, "text"), {}, ["row 1", "lacks the column 'text'", "dataset_text_field"]),
    "a row without a label": (without(4, "label"), {}, ["row 5", "lacks the column 'label'", "dataset_label_field"]),
    "a text that is a number": (changed(2, text=7), {}, ["row 3", "holds a number, not a text"]),
    "half a character": (changed(2, text="a\ud800"), {}, ["row 3", "half of a surrogate pair at character 1"]),
    "a CSV row with a cell too many": (CSV + "two,1\nthree,0,0\n", {}, ["line 4", "3 cells", "2 columns", "three"]),
    "a CSV row with a cell too few": (CSV + '"two\nlines",1\n\nthree\n', {}, ["line 6", "1 cells", "three"]),
    "a CSV with an open quote": (CSV + 'two,1\n"three,0\nfour,1\n', {}, ["line 4", "not readable as CSV"]),
    "a CSV that names a column twice": ("text,label,text\na,0,b\nc,1,d\n", {}, ["line 1", "'text' twice"]),
    "an id that stands twice": (
        [{**row, "id": min(n, 4)} for n, row in enumerate(GOOD)], {"dataset_id_field": "id"},
        ["row 6", "row 5", "the id 4", "dataset_id_field", "none numbers the rows"],
    ),
    "ids of two kinds": (
        [{**row, "id": "x" if n else 0} for n, row in enumerate(GOOD)], {"dataset_id_field": "id"},
        ["row 2", "'x'", "not mixed"],
    ),
    "an id that is null": (
        [{**row, "id": None} for row in GOOD], {"dataset_id_field": "id"}, ["row 1", "column 'id'", "null"],
    ),
    "a column of ids that is not there": (GOOD, {"dataset_id_field": "key"}, ["row 1", "'key'", "dataset_id_field"]),
    "a share that keeps nothing": (GOOD, {"eval_split_share": 1e-9}, ["eval_split_share", "none to evaluate on"]),
    "a share above 1": (GOOD, {"eval_split_share": 1.5}, ["eval_split_share", "below 1"]),
    "a class that the share took away": (
        [*GOOD[:1], *({"text": f"other {n}", "label": 1} for n in range(9))],
        {"eval_split_share": 0.5, "seed": 1}, ["that eval_split_share left to train on is of class 1", "tell apart"],
    ),
    "drop_leaked without a comparison": (GOOD, {"drop_leaked": True}, ["drop_leaked", "no evaluation"]),
    "a label column beside rules": (
        GOOD, {"label_source": "rules", "dataset_label_field": "x"}, ["dataset_label_field", "label_source"],
    ),
    "three classes of a coin": (GOOD, {"label_source": "random", "num_labels": 3}, ["num_labels is 3", "2 classes"]),
}  # fmt: skip


@pytest.fixture
def run_script(tmp_path, capsys, monkeypatch):
    """The shipped script in this process: its status and its stderr."""

    def run(content: list[dict] | str, **keys) -> tuple[int, str]:
        name = "rows.csv" if isinstance(content, str) else "rows.jsonl"
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        recipe = {**TINY_CLASSIFIER, "dataset_name": str(tmp_path / name), **keys}
        if "eval_dataset_name" not in keys:
            del recipe["eval_dataset_name"]
        monkeypatch.setattr(sys, "argv", ["prompts.py", "--config", str(write_recipe(tmp_path, recipe))])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(REPOSITORY / "train" / "prompts.py"), run_name="__main__")
        return int(leaving.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(run_script, tmp_path, mistake):
    content, keys, named = MISTAKES[mistake]
    status, said = run_script(content, **keys)
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and all(part in sentence for part in named), sentence
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_evaluation_data_with_a_new_class_are_refused(run_script, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in changed(2, label=2)), encoding="utf-8")
    status, said = run_script(GOOD, eval_dataset_name=str(other))
    assert status == 2 and f"row 3 of {other} is of class 2, and num_labels is 2: 0 to 1" in said


def test_training_data_that_all_leaked_are_refused(run_script, tmp_path):
    status, said = run_script(GOOD, eval_dataset_name=str(tmp_path / "rows.jsonl"), drop_leaked=True)
    assert status == 2 and "drop_leaked: all of" in said and not (tmp_path / "run").exists()


def test_the_files_of_these_tests_are_right_but_for_their_mistake(tmp_path):
    from tests.unit.test_labelled import quietly

    path = Path(tmp_path / "rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD), encoding="utf-8")
    assert len(quietly(str(path)).documents) == 6
    path.with_suffix(".csv").write_text(CSV + "two,1\n", encoding="utf-8")
    assert quietly(str(path.with_suffix(".csv"))).documents.labels.tolist() == [0, 1]
