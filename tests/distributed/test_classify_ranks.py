"""An evaluation on several processes is the evaluation on one: every row once, every metric the same."""

import json
import sys

import pytest
from tests.building import build_classifier
from tests.launching import launcher, run_command

from isotune.evaluation.results import read_result
from isotune.training.from_recipe import save

ROWS = 41
WAYS = {"all": ["--limit", str(ROWS)], "b1": ["--limit", str(ROWS), "--batch_size", "1"], "two": ["--limit", "2"]}
WAYS |= {f"b{size}": ["--limit", str(ROWS), "--batch_size", str(size)] for size in (7, 64)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    built = build_classifier(folder, max_steps=12, learning_rate=4e-3, eval_steps=12)
    built.trainer.train()
    save(built.start, built.trainer)
    return folder / "run"


def evaluate(run, folder, processes, ways, config="ddp.yaml"):
    """The results of `ways` on so many processes of one launch; 0 is plain python."""
    lines = [
        json.dumps(
            ["--run_dir", str(run), "--ordinal", "--no_pictures", "--output_dir", str(folder / name), *WAYS[name]]
        )
        for name in ways
    ]
    start = launcher(config, processes) if processes else [sys.executable]
    done = run_command([*start, "tests/distributed/classify_in_turn.py", *lines])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("written to") == len(ways), "one process speaks"
    return {name: read_result(folder / name) for name in ways}


@pytest.fixture(scope="module")
def on_one(run, tmp_path_factory):
    return evaluate(run, tmp_path_factory.mktemp("one"), 0, ("all", "two"))


@pytest.mark.parametrize(
    ("processes", "config", "ways"),
    [
        (3, "ddp.yaml", ("b7", "two")),
        pytest.param(3, "ddp.yaml", tuple(WAYS), marks=pytest.mark.slow),
        pytest.param(2, "zero3.yaml", tuple(WAYS), marks=pytest.mark.slow),
    ],
)
def test_metrics_and_predictions_are_those_of_one_process_even_where_a_rank_has_no_row(
    run, on_one, tmp_path, processes, config, ways
):
    several = evaluate(run, tmp_path, processes, ways, config)
    for name, result in several.items():
        one = on_one["all" if name.startswith("b") else name]
        assert [line["id"] for line in result.predictions] == list(range(2 if name == "two" else ROWS))
        assert result.metrics == pytest.approx(one.metrics, abs=1e-6)
        assert result.intervals.keys() == one.intervals.keys()
        for metric, pair in one.intervals.items():
            assert result.intervals[metric] == pytest.approx(pair, abs=1e-6), metric
        for mine, theirs in zip(result.predictions, one.predictions, strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-6)
