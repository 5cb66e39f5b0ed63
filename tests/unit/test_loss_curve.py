"""The loss curve shows what metrics.jsonl says, whatever state a run left it in."""

import json
import math

import matplotlib.image
import numpy as np
import pytest

from isotune.io.errors import UserError
from isotune.report import loss_curve
from isotune.report.loss_curve import _figure, draw_loss_curve, read_curves, smoothed


def write_metrics(folder, entries, tail=""):
    text = "".join(json.dumps(entry) + "\n" for entry in entries) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def training_line(step, loss, learning_rate=1e-4):
    return {"step": step, "epoch": step / 10, "loss": loss, "grad_norm": 1.0, "learning_rate": learning_rate}


def test_every_line_is_drawn_at_its_step_and_value(tmp_path):
    evaluations = [{"step": 5, "eval_loss": 2.5, "eval_perplexity": 12.2}, {"step": 20, "eval_loss": 1.5}]
    write_metrics(tmp_path, [training_line(step, 4.0 / step, 1e-3 * step) for step in range(1, 21)] + evaluations)

    figure = _figure(read_curves(tmp_path / "metrics.jsonl"), "run")

    losses, rates = figure.axes
    drawn = {line.get_label(): line.get_xydata() for line in losses.get_lines()}
    np.testing.assert_allclose(drawn["training"], [(step, 4.0 / step) for step in range(1, 21)])
    np.testing.assert_allclose(drawn["evaluation"], [(5, 2.5), (20, 1.5)])
    np.testing.assert_allclose(rates.get_lines()[0].get_ydata(), [1e-3 * step for step in range(1, 21)])
    assert "nats per supervised token" in losses.get_ylabel()
    assert "step" in rates.get_xlabel()
    assert "learning rate" in rates.get_ylabel()


def test_a_classifier_has_its_accuracy_beside_its_loss_by_step_by_epoch_and_in_evaluation(tmp_path):
    counts, correct, losses = [7, 7, 6, 7, 7, 6, 7], [1, 2, 3, 4, 5, 6, 7], [3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.4]
    lines = [
        {**training_line(step, loss), "epoch": step / 3, "documents": n, "accuracy": right / n}
        for step, (n, right, loss) in enumerate(zip(counts, correct, losses, strict=True), start=1)
    ]
    lines += [{"step": 3, "eval_loss": 2.5, "eval_accuracy": 0.4}, {"step": 6, "eval_loss": 1.5, "eval_accuracy": 0.7}]
    write_metrics(tmp_path, lines)

    figure = _figure(read_curves(tmp_path / "metrics.jsonl"), "run")

    panels = dict(zip(("loss", "accuracy", "rate"), figure.axes, strict=True))
    drawn = {n: {line.get_label(): line.get_xydata() for line in p.get_lines()} for n, p in panels.items()}
    steps = [(step, right / n) for step, (n, right) in enumerate(zip(counts, correct, strict=True), start=1)]
    np.testing.assert_allclose(drawn["accuracy"]["training"], steps)
    np.testing.assert_allclose(drawn["accuracy"]["evaluation"], [(3, 0.4), (6, 0.7)])
    # six of twenty in the first epoch, fifteen of twenty in the second; the third is not over
    np.testing.assert_allclose(drawn["accuracy"]["training, mean of the epoch"], [(3, 6 / 20), (6, 15 / 20)])
    means = [(3.0 * 7 + 2.5 * 7 + 2.0 * 6) / 20, (1.5 * 7 + 1.0 * 7 + 0.5 * 6) / 20]
    np.testing.assert_allclose(drawn["loss"]["training, mean of the epoch"], [(3, means[0]), (6, means[1])])
    assert "nats per document" in panels["loss"].get_ylabel() and panels["accuracy"].get_ylabel() == "accuracy"


def test_lines_of_several_steps_have_an_epochs_mean_where_they_end_with_it_and_its_window_in_steps(tmp_path):
    """Lines of four steps, first in epochs of six: what ends with a line is never one whole epoch."""
    lines = [training_line(4 * n, float(n)) | {"steps": 4, "epoch": 4 * n / 6, "documents": 28} for n in range(1, 13)]
    write_metrics(tmp_path, lines)
    curve = read_curves(tmp_path / "metrics.jsonl")["loss"]
    assert (curve.epoch_steps, curve.epoch_values) == ([], [])
    axes = _figure({"loss": curve, "learning_rate": curve}, "run").axes[0]
    assert "training, averaged over 16 steps" in axes.get_legend_handles_labels()[1]  # four lines
    write_metrics(tmp_path, [line | {"epoch": line["step"] / 8} for line in lines])
    curve = read_curves(tmp_path / "metrics.jsonl")["loss"]
    assert (curve.epoch_steps[:2], curve.epoch_values[:2]) == ([8, 16], [1.5, 3.5])


def test_the_picture_is_a_png_that_is_not_blank(tmp_path):
    write_metrics(tmp_path, [training_line(step, 3.0 / step) for step in range(1, 40)])

    picture = draw_loss_curve(tmp_path)

    assert picture == tmp_path / "loss_curve.png"
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] >= 800
    assert (pixels[..., :3] < 0.9).any(axis=-1).mean() > 0.005
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss_curve.png", "metrics.jsonl"]


def test_a_run_of_one_step_is_drawn(tmp_path):
    write_metrics(tmp_path, [training_line(1, 10.8)])
    assert draw_loss_curve(tmp_path).is_file()


@pytest.mark.parametrize("lost", [None, math.nan, math.inf, "NaN"])
def test_a_step_without_a_finite_loss_leaves_a_gap_and_a_mark(tmp_path, lost):
    write_metrics(tmp_path, [training_line(1, 2.0), training_line(2, lost), training_line(3, 1.0)])

    figure = _figure(read_curves(tmp_path / "metrics.jsonl"), "run")

    drawn = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    np.testing.assert_array_equal(drawn["training"][:, 1], [2.0, np.nan, 1.0])
    assert drawn["loss not finite (1 step)"][:, 0].tolist() == [2]
    assert draw_loss_curve(tmp_path).is_file()


def test_a_run_whose_every_loss_is_lost_is_drawn(tmp_path):
    write_metrics(tmp_path, [training_line(step, None, None) for step in range(1, 4)])
    assert draw_loss_curve(tmp_path).is_file()


def test_a_last_line_that_a_killed_run_cut_off_is_passed_over(tmp_path):
    write_metrics(tmp_path, [training_line(1, 2.0), training_line(2, 1.5)], tail='{"step": 3, "lo')
    assert read_curves(tmp_path / "metrics.jsonl")["loss"].steps.tolist() == [1, 2]


def test_lines_that_are_no_objects_are_passed_over(tmp_path):
    write_metrics(tmp_path, [training_line(1, 2.0), 7, [], {"note": "resumed"}, {"step": "2", "loss": 1.0}])
    assert read_curves(tmp_path / "metrics.jsonl")["loss"].values.tolist() == [2.0]


def test_a_step_that_a_resumed_run_repeated_counts_as_it_was_written_last(tmp_path):
    write_metrics(tmp_path, [training_line(1, 3.0), training_line(2, 2.0), training_line(2, 1.9)])
    curve = read_curves(tmp_path / "metrics.jsonl")["loss"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1, 2], [3.0, 1.9])


def test_smoothing_is_the_weighted_mean_of_the_window():
    values = [1.0, 5.0, math.nan, 2.0, 8.0]
    expected = []
    for i in range(5):
        weights = {j: math.exp(-0.5 * (j - i) ** 2) for j in (0, 1, 3, 4) if abs(j - i) <= 2}
        expected.append(sum(w * values[j] for j, w in weights.items()) / sum(weights.values()))
    expected[2] = math.nan
    np.testing.assert_allclose(smoothed(values, width=4.0), expected, rtol=1e-12)


def test_a_straight_line_stays_one_away_from_its_ends_so_a_fall_is_not_shown_late():
    values = [10.0 - 0.1 * step for step in range(100)]
    np.testing.assert_allclose(smoothed(values, width=10.0)[5:-5], values[5:-5], rtol=1e-12)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("", "has no line"), ('{"step": 1', "has no line")]
)
def test_a_folder_without_losses_is_named_in_one_sentence(tmp_path, content, says):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=says) as mistake:
        draw_loss_curve(tmp_path)
    assert str(tmp_path / "metrics.jsonl") in str(mistake.value)
    assert not (tmp_path / "loss_curve.png").exists()


def test_a_long_curve_is_smoothed_by_transforms_to_the_same_values(monkeypatch):
    values = np.random.default_rng(0).normal(2.0, 0.5, 3001)
    values[[7, 1500]] = math.nan
    plain = smoothed(values, width=300.0)
    monkeypatch.setattr(loss_curve, "MAX_PRODUCTS", 0)
    np.testing.assert_allclose(smoothed(values, width=300.0), plain, rtol=1e-12)


def test_a_million_steps_are_drawn_as_some_thousand_points_without_losing_a_peak(tmp_path):
    values = np.ones(1_000_000)
    values[[123_456, 654_321]] = 9.0, -9.0
    steps, kept = loss_curve.downsample(np.arange(len(values)), values, loss_curve.MAX_POINTS)
    assert len(steps) < 3 * loss_curve.MAX_POINTS and {123_456, 654_321} <= set(steps.tolist())
    assert (kept.max(), kept.min()) == (9.0, -9.0)
