"""The bar shows what a person waits for: loss, supervised tokens a second, steps left; results stay as lines."""

import io
import math
from types import SimpleNamespace

import pytest
from tqdm import tqdm
from transformers import TrainerControl, TrainerState

from isotune.training.recorder import ProgressBar


def begun(quiet: bool = False, main: bool = True) -> tuple[ProgressBar, TrainerState]:
    progress = ProgressBar(quiet=quiet)
    state = TrainerState(max_steps=10, global_step=4, is_world_process_zero=main)
    progress.on_train_begin(SimpleNamespace(), state, TrainerControl())
    return progress, state


def test_the_bar_counts_from_where_the_run_goes_on_and_shows_loss_and_speed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # of the terminal: the bar's own speed may be long
    progress, state = begun()
    progress.show({"loss": 1.23456, "accuracy": 0.5}, {"supervised_tokens_per_s": 7890.4}, skipped=0)
    assert progress.bar is not None and (progress.bar.n, progress.bar.total) == (5, 10)
    progress.bar.refresh()
    shown = capsys.readouterr().err
    assert (
        "loss=1.2346" in shown
        and "accuracy=0.5000" in shown
        and "supervised_tokens_per_s=7890" in shown
        and "skipped" not in shown
    )
    progress.show({"loss": math.nan}, {"supervised_tokens_per_s": 1.0}, skipped=2)
    progress.bar.refresh()
    assert "skipped_steps=2" in capsys.readouterr().err
    progress.on_train_end(SimpleNamespace(), state, TrainerControl())
    assert progress.bar is None


@pytest.mark.parametrize("columns", [200, 100, 80, 66])
def test_a_field_that_a_terminal_has_no_room_for_is_left_out_whole(columns: int):
    progress = ProgressBar(quiet=False)
    progress.bar = tqdm(total=400, initial=12, unit="step", ncols=columns, file=io.StringIO())
    progress.show({"loss": 1.23456, "accuracy": 0.5}, {"supervised_tokens_per_s": 7890.4}, skipped=2)
    fields = ["loss=1.2346", "accuracy=0.5000", "skipped_steps=2", "supervised_tokens_per_s=7890"]
    line = str(progress.bar)
    shown = line.removesuffix("]").split(", ")[2:]
    assert len(line) <= columns and line.endswith("]")
    assert shown and shown == fields[: len(shown)]
    assert (len(shown) == len(fields)) == (columns == 200)


def test_an_evaluation_is_a_line_of_its_own(capsys):
    progress, state = begun(quiet=True)
    found = {"eval_loss": 2.0, "eval_perplexity": math.exp(2.0)}
    progress.on_evaluate(SimpleNamespace(), state, TrainerControl(), metrics=found)
    assert capsys.readouterr().err == "step 4: eval_loss 2.0000, perplexity 7.39\n"


def test_quiet_runs_and_other_ranks_draw_no_bar(capsys):
    for progress, _ in (begun(quiet=True), begun(main=False)):
        progress.show({"loss": 1.0}, {"supervised_tokens_per_s": 1.0}, skipped=0)
        assert progress.bar is None
    assert capsys.readouterr().err == ""
