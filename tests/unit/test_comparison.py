"""A comparison pairs what belongs together, says a difference where one is, and refuses what cannot be compared."""

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from isotune.cli import main
from isotune.evaluation.comparison import compare_runs
from isotune.evaluation.results import write_result
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError
from isotune.projects.arena.battles import Battle, Battles
from isotune.projects.arena.preference import write_preferences
from isotune.report import formatting

ROWS = 200
LABELS = np.random.default_rng(0).integers(0, 3, ROWS)


def shares(seed, strength):
    """float64 [rows, 3]: of a classifier that knows the truth as well as `strength`; some rows are hard for all."""
    noise = np.random.default_rng(1).normal(size=(ROWS, 3)) + np.random.default_rng(seed).normal(size=(ROWS, 3))
    scores = np.exp(noise + strength * np.eye(3)[LABELS])
    return scores / scores.sum(axis=1, keepdims=True)


def write_classifier(run, probabilities, name="test", labels=LABELS, ids=None, text="text", split="test", groups=None):
    ids = list(range(len(labels))) if ids is None else ids
    facts = {"kind": "classification", "model": str(run), "dataset_name": "builtin:opinions", "dataset_split": split}
    rows = [
        {"id": i, "label": int(label), "probabilities": list(map(float, row))}
        for i, label, row in zip(ids, labels, probabilities, strict=True)
    ]
    for row, group in zip(rows, groups or [], strict=False):
        row["group"] = group
    write_result(run / "eval" / name, facts, Scores({}, {}), rows, [f"{text} {i}" for i in ids])
    return run


def write_generator(run, texts, references, **more):
    facts = {"kind": "generation", "model": str(run), "dataset_name": "builtin:pirate", "dataset_split": "test"}
    facts |= more
    rows = [
        {"id": i, "prompt": f"question {i}", "reference": reference, "text": text, "ended": 1.0}
        for i, (text, reference) in enumerate(zip(texts, references, strict=True))
    ]
    write_result(run / "eval" / "pirate", facts, Scores({}, {}), rows, references)
    return run


@pytest.fixture
def runs(tmp_path):
    """A, one that is as good, and one that is better."""
    return [
        write_classifier(tmp_path / name, shares(seed, strength))
        for name, seed, strength in (("a", 2, 1.0), ("b", 3, 1.0), ("c", 4, 3.0))
    ]


def cli(capsys, *arguments):
    """Exit status, stdout and stderr of `isotune compare ARGUMENTS`."""
    with pytest.raises(SystemExit) as leaving:
        main(["compare", *map(str, arguments)])
    printed = capsys.readouterr()
    return leaving.value.code or 0, printed.out, printed.err


def test_a_better_run_is_said_to_be_better_in_every_metric(runs):
    (pair,) = compare_runs([runs[0], runs[2]], resamples=1_000).pairs
    assert [one.metric for one in pair.differences] == ["accuracy", "f1_macro", "log_loss", "brier"]
    assert all(one.shown and one.better == "b" for one in pair.differences)
    (turned,) = compare_runs([runs[2], runs[0]], resamples=1_000).pairs
    assert all(one.shown and one.better == "a" for one in turned.differences)
    assert all(one.low <= one.difference <= one.high for one in [*pair.differences, *turned.differences])


def test_the_numbers_are_those_of_other_libraries(runs):
    (pair,) = compare_runs([runs[0], runs[2]], resamples=200).pairs
    found = {one.metric: one for one in pair.differences}
    a, b = shares(2, 1.0), shares(4, 3.0)
    right_a, right_b = a.argmax(1) == LABELS, b.argmax(1) == LABELS
    only_a, only_b = (right_a & ~right_b).sum(), (right_b & ~right_a).sum()
    assert (pair.only_a, pair.only_b) == (only_a, only_b)
    assert found["accuracy"].p == pytest.approx(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)
    assert found["accuracy"].difference == pytest.approx(right_b.mean() - right_a.mean())
    assert found["f1_macro"].b == pytest.approx(f1_score(LABELS, b.argmax(1), average="macro"))
    assert found["log_loss"].a == pytest.approx(log_loss(LABELS, a))


def test_a_run_compared_with_itself_shows_no_difference(runs, capsys):
    status, out, _ = cli(capsys, runs[0], runs[0])
    assert status == 0
    assert "no difference shown between A and B" in out
    assert "accuracy: 0 rows right in B only, 0 in A only" in out
    (pair,) = compare_runs([runs[0], runs[0]], resamples=200).pairs
    for one in pair.differences:
        assert (one.difference, one.low, one.high, one.p, one.shown) == (0, 0, 0, 1, False)
    assert not pair.gained and not pair.lost


def test_a_difference_within_chance_has_no_better_side(runs):
    (pair,) = compare_runs(runs[:2], resamples=200).pairs
    assert [(one.shown, one.better) for one in pair.differences] == [(False, None)] * 4
    assert all(one.p_holm > 0.05 and one.difference != 0 for one in pair.differences)


def test_p_values_are_adjusted_for_all_tests_of_all_pairs(runs):
    comparison = compare_runs(runs, all_pairs=True, resamples=300)
    assert [(pair.a, pair.b) for pair in comparison.pairs] == [(0, 1), (0, 2), (1, 2)]
    every = [one for pair in comparison.pairs for one in pair.differences]
    assert comparison.tests == len(every) == 12
    expected = multipletests([one.p for one in every], method="holm")[1]
    np.testing.assert_allclose([one.p_holm for one in every], expected)
    assert [(pair.a, pair.b) for pair in compare_runs(runs, resamples=100).pairs] == [(0, 1), (0, 2)]


def test_changed_rows_are_shown_both_ways_the_clearest_first(runs):
    (pair,) = compare_runs(runs[:2], resamples=100, examples=1_000).pairs
    a, b = shares(2, 1.0), shares(3, 1.0)
    right_a, right_b = a.argmax(1) == LABELS, b.argmax(1) == LABELS
    gain = (b - a)[np.arange(ROWS), LABELS]
    assert [row.id for row in pair.gained] == sorted(np.flatnonzero(right_b & ~right_a), key=lambda i: -gain[i])
    assert [row.id for row in pair.lost] == sorted(np.flatnonzero(right_a & ~right_b), key=lambda i: gain[i])
    assert pair.gained[0].b["probabilities"] == b[pair.gained[0].id].tolist()


def test_where_the_same_rows_are_right_those_whose_probabilities_changed_are_shown(tmp_path):
    a = shares(2, 1.0)
    sharper = a**1.3 / (a**1.3).sum(axis=1, keepdims=True)
    runs = [write_classifier(tmp_path / name, one) for name, one in (("a", a), ("b", sharper))]
    (pair,) = compare_runs(runs, resamples=100, examples=1_000).pairs
    gain = (sharper - a)[np.arange(ROWS), LABELS]
    assert (pair.only_a, pair.only_b) == (0, 0)
    assert [row.id for row in pair.gained] == sorted(np.flatnonzero(gain > 0), key=lambda i: -gain[i])
    assert [row.id for row in pair.lost] == sorted(np.flatnonzero(gain < 0), key=lambda i: gain[i])
    assert pair.gained and pair.lost


def test_a_metric_that_is_no_number_is_left_out_and_one_that_is_zero_is_not(tmp_path):
    one_class = np.zeros(ROWS, int)
    wrong = np.roll(np.eye(3)[one_class], 1, axis=1) * 0.8 + 0.1 * np.ones(3)
    runs = [
        write_classifier(tmp_path / "wrong", wrong / wrong.sum(1, keepdims=True), labels=one_class),
        write_classifier(tmp_path / "b", shares(3, 1.0), labels=one_class),
    ]
    compared = compare_runs([*runs, runs[0]], metrics=["roc_auc", "accuracy"], resamples=100, all_pairs=True)
    assert compared.notes[0] == f"roc_auc is undefined in {runs[0] / 'eval' / 'test'}, and is not compared"
    for pair in compared.pairs:
        (found,) = pair.differences
        assert found.metric == "accuracy" and 0.0 in (found.a, found.b)


def test_a_metric_of_ranks_is_tested_by_the_bootstrap(runs):
    (pair,) = compare_runs([runs[0], runs[2]], metrics=["roc_auc", "f1_class_2"], resamples=300).pairs
    assert {one.metric: one.test for one in pair.differences} == {
        "roc_auc": "paired bootstrap",
        "f1_class_2": "swap test",
    }
    assert pair.differences[0].p == pytest.approx(2 / 301)


REFERENCES = [f"Arr, the number be {n}, matey!" for n in range(40)]


def test_rows_are_paired_by_their_ids_wherever_they_stand_in_the_file(runs):
    expected = compare_runs(runs[:2], resamples=200)
    file = runs[1] / "eval" / "test" / "predictions.jsonl"
    file.write_text("".join(f"{line}\n" for line in reversed(file.read_text().splitlines())))
    assert compare_runs(runs[:2], resamples=200) == expected


def test_rows_of_one_group_count_once(runs, tmp_path, capsys):
    """Every row four times over, as answers to one prompt, tells no more than the rows themselves."""
    times, metrics = 4, ["log_loss", "f1_macro", "roc_auc", "accuracy"]
    groups = [f"{row:04}" for row in range(ROWS)] * times
    repeated = [
        write_classifier(
            tmp_path / f"four {name}",
            np.tile(shares(seed, 1.0), (times, 1)),
            labels=np.tile(LABELS, times),
            groups=groups,
        )
        for name, seed in (("a", 2), ("b", 3))
    ]
    once, grouped = compare_runs(runs[:2], metrics=metrics), compare_runs(repeated, metrics=metrics)
    assert (once.groups, grouped.groups, grouped.rows) == (None, ROWS, ROWS * times)
    for single, one in zip(once.pairs[0].differences, grouped.pairs[0].differences, strict=True):
        assert (one.low, one.high) == pytest.approx((single.low, single.high), rel=1e-5, abs=1e-9), one.metric
        if one.metric == "accuracy":  # McNemar's test would take the rows for independent ones
            assert one.test == "swap test" and one.p == pytest.approx(single.p, abs=0.05)
        else:
            assert one.test == single.test and one.p == pytest.approx(single.p, abs=1e-3)
    assert cli(capsys, *repeated, "--metrics", "log_loss")[0] == 0


def test_answers_to_one_prompt_of_the_arena_are_one_group(tmp_path):
    chance = np.random.default_rng(0)
    asked = [(f"Question {row % 9}?" if row % 2 else f"question  {row % 9}?",) for row in range(60)]
    battles = Battles(
        "train.csv",
        tuple(Battle(str(row), asked[row], ("yes",), (f"no {row}",), row % 3) for row in range(60)),
        null_turns=0,
        lone_surrogates=0,
    )
    for name in ("one", "other"):
        predictions = {name: chance.dirichlet(np.ones(3), 60)}
        write_preferences(tmp_path / name, battles, predictions, main=name, model=name, split="kept")
    found = compare_runs([tmp_path / "one", tmp_path / "other"], resamples=200)
    assert (found.rows, found.groups) == (60, 9)  # letter case and white space tell no prompts apart
    assert "one of 9 prompts go together" in formatting.describe_tests(found)


def test_generated_texts_are_compared_by_their_texts(tmp_path):
    from sacrebleu.metrics.bleu import BLEU

    poor = [f"It be {n}." if n % 4 else text for n, text in enumerate(REFERENCES)]
    runs = [write_generator(tmp_path / "a", poor, REFERENCES), write_generator(tmp_path / "b", REFERENCES, REFERENCES)]
    (pair,) = compare_runs(runs, metrics=["exact_match", "bleu", "chrf", "length_ratio"], resamples=300).pairs
    found = {one.metric: one for one in pair.differences}
    assert (pair.only_b, pair.only_a, pair.right_means) == (30, 0, "exact_match")
    assert found["bleu"].a == pytest.approx(BLEU().corpus_score(poor, [REFERENCES]).score)
    assert found["exact_match"].test == "McNemar, exact"
    assert found["bleu"].better == found["chrf"].better == "b"
    assert found["length_ratio"].shown and found["length_ratio"].better is None
    assert [pair.gained[0].a["text"], pair.gained[0].b["text"]] == [
        poor[pair.gained[0].id],
        REFERENCES[pair.gained[0].id],
    ]


def test_answers_that_were_decoded_otherwise_are_compared_with_a_note(tmp_path, capsys):
    greedy = {"temperature": 0.0, "max_new_tokens": 16}
    one = write_generator(tmp_path / "a", REFERENCES, REFERENCES, decoding=greedy)
    same = write_generator(tmp_path / "b", REFERENCES, REFERENCES, decoding=greedy)
    other = write_generator(tmp_path / "c", REFERENCES, REFERENCES, decoding=greedy | {"temperature": 0.7})
    assert compare_runs([one, same], resamples=100).notes == []
    (note,) = compare_runs([one, same, other], resamples=100).notes
    assert note.endswith(
        "was decoded otherwise than " + str(one / "eval" / "pirate") + ": temperature 0.7 instead of 0.0"
    )
    assert note in cli(capsys, one, other)[1]


def test_the_table_names_runs_tests_and_verdicts(runs, capsys):
    status, out, _ = cli(capsys, *runs)
    assert status == 0
    for part in ("200 rows of builtin:opinions (test)", f"C  {runs[2]}/eval/test", "McNemar, exact", "C is better"):
        assert part in out
    assert "p (Holm) is adjusted for all 8 tests here" in out


def test_json_holds_what_the_table_says(runs, capsys):
    status, out, _ = cli(capsys, *runs[:2], "--json", "--resamples", 200, "--metrics", "accuracy")
    found = json.loads(out)
    assert (status, found["difference_shown"], found["rows"], found["tests"]) == (0, False, ROWS, 1)
    assert found["pairs"][0]["differences"][0]["metric"] == "accuracy"
    assert {"id", "a", "b"} == set(found["pairs"][0]["gained"][0])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            {"ids": [str(row) for row in range(ROWS)]},
            "the ids are numbers in one and texts in the other, as those of a CSV",
        ),
        ({"ids": [*range(ROWS - 2), 777, 778]}, "2 rows only in {a}/eval/test (id 198, 199); 2 rows only in {b}"),
        ({"labels": (LABELS + (np.arange(ROWS) == 7)) % 3}, "row 7 has the label"),
        ({"text": "other"}, "the ids are the same, but not the texts of the rows"),
        ({"text": "other", "split": "train"}, "dataset_split is test in one and train in the other"),
    ],
)
def test_other_rows_are_refused_with_what_differs(tmp_path, other, says, capsys):
    a = write_classifier(tmp_path / "a", shares(2, 1.0))
    b = write_classifier(tmp_path / "b", shares(3, 1.0), **other)
    status, out, complaint = cli(capsys, a, b)
    assert (status, out) == (2, "")
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert says.format(a=a, b=b) in complaint


def test_a_classifier_is_not_compared_with_a_generator_or_with_other_classes(runs, tmp_path):
    texts = [f"text {i}" for i in range(ROWS)]
    with pytest.raises(UserError, match="one is a classification result, the other a generation result"):
        compare_runs([runs[0], write_generator(tmp_path / "g", texts, texts)])
    fewer = write_classifier(tmp_path / "two", shares(2, 1.0)[:, :2])
    with pytest.raises(UserError, match="a label is not a class"):
        compare_runs([runs[0], fewer])
    more = write_classifier(tmp_path / "four", np.hstack([shares(2, 1.0), np.zeros((ROWS, 1))]))
    with pytest.raises(UserError, match=r"/a/eval/test and \S+/four/eval/test cannot be compared: 3 and 4 classes"):
        compare_runs([runs[0], runs[1], more])


def test_the_evaluation_in_common_is_found_or_named(tmp_path):
    a = write_classifier(tmp_path / "a", shares(2, 1.0), name="first")
    write_classifier(tmp_path / "a", shares(3, 1.0), name="second", text="other")
    b = write_classifier(tmp_path / "b", shares(3, 1.0), name="second", text="other")
    assert compare_runs([a, b], resamples=100).results == [str(a / "eval/second"), str(b / "eval/second")]
    c = write_classifier(tmp_path / "c", shares(4, 1.0), name="third")
    assert compare_runs([a, c], resamples=100).results == [str(a / "eval/first"), str(c / "eval/third")]
    of_one_run = compare_runs([a / "eval/first", c], resamples=100)
    assert of_one_run.results == [str(a / "eval/first"), str(c / "eval/third")]
    write_classifier(tmp_path / "b", shares(3, 1.0), name="first")
    with pytest.raises(UserError, match="several evaluations in common: first, second; choose by --name"):
        compare_runs([a, b])
    assert compare_runs([a, b], name="first", resamples=100).results[1] == str(b / "eval/first")
    with pytest.raises(UserError, match="'fourth': it has first, second"):
        compare_runs([a, b], name="fourth")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "RUN"),
        (["{a}"], "two runs or more"),
        (["{a}", "/nowhere"], "there is no folder /nowhere"),
        (["{a}", "{empty}"], "holds no evaluation: run eval/classify.py or eval/generate.py"),
        (["{a}", "{cut}"], "is not JSON: the file is truncated"),
        (["{a}", "{b}", "--metrics", "acuracy"], "'acuracy' is not a metric of all these results; there are accuracy,"),
        (["{a}", "{b}", "--resamples", "7"], "--resamples is 7: it is at least 100"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(runs, tmp_path, capsys, arguments, says):
    (tmp_path / "empty").mkdir()
    cut = write_classifier(tmp_path / "cut", shares(2, 1.0)) / "eval/test/predictions.jsonl"
    cut.write_text(cut.read_text()[:-30])
    places = {"a": runs[0], "b": runs[1], "empty": tmp_path / "empty", "cut": tmp_path / "cut"}
    status, out, complaint = cli(capsys, *(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "")
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert says in complaint


def test_the_script_is_the_command(runs, repository, capsys):
    command = [*map(str, runs[:2]), "--resamples", "200"]
    script = subprocess.run(
        [sys.executable, "eval/compare.py", *command], cwd=repository, capture_output=True, text=True, check=True
    )
    assert script.stdout == cli(capsys, *command)[1]
