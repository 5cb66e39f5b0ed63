"""What is asked and measured stands in a small file; whatever is wrong in it is named with its key."""

import json
from pathlib import Path

import pytest
import yaml

from isotune.evaluation.metrics.text import TEXT_METRICS
from isotune.evaluation.tasks import GenerationTask, read_task
from isotune.io.errors import UserError

ROWS = [{"country": "Peru", "capital": "Lima"}, {"country": "Mali", "capital": " Bamako "}]
COLUMNS = {"prompt_template": "What is the capital of {country}?", "reference_template": "{capital}"}


def write_task(folder: Path, **values) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump({"dataset_name": str(folder / "rows.jsonl"), **values}))
    return file


def test_questions_are_made_of_columns(tmp_path):
    task = read_task(GenerationTask, write_task(tmp_path, **COLUMNS, metrics=["chrf"], max_new_tokens=7), {})
    asked = task.samples()
    assert [(q.id, q.prompt, q.reference) for q in asked] == [
        (0, "What is the capital of Peru?", "Lima"),
        (1, "What is the capital of Mali?", "Bamako"),
    ]
    assert len(task.samples(1)) == 1
    assert (task.name, task.metrics, task.max_new_tokens) == ("rows", ("chrf",), 7)


def test_a_flag_wins_over_the_file(tmp_path):
    task = read_task(
        GenerationTask, write_task(tmp_path, max_new_tokens=7), {"max_new_tokens": 9, "dataset_split": None}
    )
    assert (task.max_new_tokens, task.dataset_split, task.metrics) == (9, "test", TEXT_METRICS)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"metric": ["chrf"]}, "no key 'metric': did you mean 'metrics'"),
        ({"metrics": ["accuracy"]}, "no metric 'accuracy'"),
        ({"metrics": "chrf"}, "metrics is 'chrf': it is a list"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many': it is a whole number"),
        ({"prompt_template": "{country}"}, "prompt_template and reference_template go together"),
        ({**COLUMNS, "prompt_template": "no column"}, "template 'no column'"),
        ({"dataset_name": ""}, "nothing to evaluate on"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, values, complaint):
    with pytest.raises(UserError, match=complaint):
        read_task(GenerationTask, write_task(tmp_path, **values), {})


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"country": "Chad"}, "row 3 of .* lacks the column 'capital'"),
        ({"country": "Chad", "capital": " "}, "row 3 .* empty reference"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, row, complaint):
    file = write_task(tmp_path, **COLUMNS)
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=complaint):
        read_task(GenerationTask, file, {}).samples()


def test_every_shipped_task_is_whole(repository):
    files = sorted((repository / "eval" / "configs").glob("*.yaml"))
    tasks = [read_task(GenerationTask, file, {}) for file in files if "\nlabels:" not in file.read_text()]
    assert [task.name for task in tasks] == ["openassistant-guanaco", "pirate"]
    assert all(task.metrics == TEXT_METRICS for task in tasks)
    assert len(tasks[1].samples()) == 32
