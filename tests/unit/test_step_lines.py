"""Lines of metrics.jsonl as columns say what they say line by line, read by some thousand or one by one."""

import json
import math

import numpy as np
import pytest

from isotune.run import metrics_file
from isotune.run.metrics_file import read_line, read_metrics
from isotune.run.step_lines import StepLines

LINES = [
    '{"step": 1, "loss": 2.0, "documents": 3, "note": "resumed"}',
    '{"step": 2, "loss": null, "documents": 9007199254740993, "flag": true}',
    '{"step": 2, "eval_loss": 1.5, "eval_accuracy": NaN}',
    '{"step": 4, "loss": 1e999, "grad_norm": 1}',
    '{"step": 3, "loss": 1.25, "parts": [1, 2]}',
    '{"step": 1, "loss": 1.75, "documents": 3}',
    '{"step": "5", "loss": 1.0}',
    '{"step": 6, "loss": 1.0, "nested": {"a": 1}}',
    '{"step": 7, "loss": 1.0',
    '{"step": 8, "loss": 1.0}, {"step": 9, "loss": 1.0}',
    "7",
    "",
]


def by_lines(lines: list[str]) -> tuple[dict, dict, list[int]]:
    """What reading one line at a time finds."""
    steps, evaluations, broken = {}, {}, []
    for number, line in enumerate(lines, start=1):
        entry = read_line(line.encode())
        if entry is None:
            broken.append(number)
            continue
        if "loss" in entry:
            steps[entry["step"]] = entry
        if "eval_loss" in entry:
            evaluations[entry["step"]] = entry
    return steps, evaluations, broken


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4096])
@pytest.mark.parametrize("lines", [LINES, LINES[:6], LINES[7:9] * 3, LINES[9:] * 2])
def test_chunks_of_lines_say_what_the_lines_say(tmp_path, monkeypatch, lines, size):
    monkeypatch.setattr(metrics_file, "CHUNK_LINES", size)
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    found = read_metrics(tmp_path / "metrics.jsonl")
    steps, evaluations, broken = by_lines(lines)
    assert (dict(found.steps), dict(found.evaluations)) == (steps, evaluations) and found.broken_lines == broken
    assert list(found.steps) == sorted(steps)
    for step, line in found.steps.items():
        assert {key: type(value) for key, value in line.items()} == {k: type(v) for k, v in steps[step].items()}


def test_a_column_has_the_numbers_of_a_key_whenever_it_came(monkeypatch):
    monkeypatch.setattr("isotune.run.step_lines._CHUNK_LINES", 2)
    lines = [{"step": step, "loss": 1.0 / step} | ({"tokens": step} if step in (3, 5) else {}) for step in range(1, 6)]
    table = StepLines([*lines[::-1], {"step": 4, "loss": math.inf}])
    np.testing.assert_array_equal(table.column("loss"), [1.0, 1 / 2, 1 / 3, np.nan, 1 / 5])
    assert table.has("tokens").tolist() == [False, False, True, False, True]
    assert table.total("tokens") == 8 and isinstance(table.total("tokens"), int)
    assert np.isnan(table.column("absent")).all() and table.total("absent") == 0 and not table.has("absent").any()
    assert len(table) == 5 and 3 in table and 6 not in table and table.keys_of_lines == {"step", "loss", "tokens"}
    assert json.dumps(table[5]) == '{"step": 5, "loss": 0.2, "tokens": 5}'
    with pytest.raises(KeyError):
        table[6]
    assert not StepLines() and len(StepLines().column("loss")) == 0
