"""What a comparison reads of results: which belong together, in which order, and what of each row counts."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isotune.evaluation.paired_results import choose_results, groups_of, measure_rows, with_classes_of
from isotune.evaluation.results import Result, write_result
from isotune.evaluation.statistics.resampling import Scores, values
from isotune.io.errors import UserError

LABELLED = {"label": 0, "probabilities": [0.9, 0.1]}


def result(rows: list[dict[str, Any]], folder: str = "run/eval/test", **facts: Any) -> Result:
    facts = {"kind": "classification", "dataset_name": "d", "dataset_split": "test", "rows_sha256": "0", **facts}
    return Result(Path(folder), facts, {}, {}, [{"id": i, **row} for i, row in enumerate(rows)])


def write(run: Path, name: str, ids: list[Any], texts: str = "text", **facts: Any) -> Path:
    kinds = {"kind": "classification", "model": "m", "dataset_name": "d", "dataset_split": "test", **facts}
    rows = [{"id": i, **LABELLED} for i in ids]
    write_result(run / "eval" / name, kinds, Scores({}, {}), rows, [f"{texts} {i}" for i in ids])
    return run


def test_rows_of_one_group_are_one_unit_and_groups_of_one_row_are_none():
    def of(names: list[Any]) -> list[int] | None:
        found = groups_of([result([{**LABELLED, **({} if n is None else {"group": n})} for n in names])])
        return None if found is None else found.tolist()

    assert of(["b", "a", "b"]) == [1, 0, 1]
    assert of([7, 7, 7]) == [0, 0, 0]
    assert of(["a", "b", "c"]) is None and of(["a", None, "a"]) is None


def test_the_only_evaluation_of_each_run_is_chosen_whatever_it_is_called(tmp_path):
    a, b = write(tmp_path / "a", "here", [0, 1]), write(tmp_path / "b", "there", [0, 1])
    assert [found.folder.name for found in choose_results([a, b])] == ["here", "there"]
    c = write(tmp_path / "c", "elsewhere", [0, 2])
    with pytest.raises(
        UserError, match=r"2 and 2 rows; 1 row only in \S+a/eval/here \(id 1\); 1 row only in \S+ \(id 2\)"
    ):
        choose_results([a, c])


def test_evaluations_of_other_names_are_chosen_by_their_rows(tmp_path):
    a = write(write(tmp_path / "a", "before", [8, 9]), "mine", [0, 1])
    b = write(write(tmp_path / "b", "other", [4, 5]), "yours", [0, 1])
    assert [found.folder.name for found in choose_results([a, b])] == ["mine", "yours"]
    assert [found.folder.name for found in choose_results([b, a])] == ["yours", "mine"]
    c = write(write(write(tmp_path / "c", "one", [0, 1]), "two", [0, 1]), "three", [6])
    with pytest.raises(UserError, match=r"no evaluation is common to the runs: \S+a has before, mine; \S+c has "):
        choose_results([a, c])


@pytest.mark.parametrize(
    ("name", "claimed", "says"),
    [
        ("step-00000100", False, "is an evaluation made in training"),
        ("test", True, "holds no finished evaluation"),
    ],
)
def test_predictions_without_metrics_are_answered_with_their_run(tmp_path, monkeypatch, name, claimed, says):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/one/eval", name)
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text('{"id": 0, "label": 0, "probabilities": [0.9, 0.1]}\n')
    if claimed:
        (folder / ".evaluation.json").write_text("{}")
    with pytest.raises(UserError) as mistake:
        choose_results([folder, folder])
    assert str(mistake.value).startswith(f"{folder} {says}: run ")
    assert str(mistake.value).endswith(" with --run_dir runs/one")


@pytest.mark.parametrize(("extra", "shown"), [(1, "5"), (3, "5, 6, 7"), (4, r"5, 6, 7, \.\.\.")])
def test_three_ids_of_rows_that_one_side_lacks_are_named(tmp_path, extra: int, shown: str):
    a, b = write(tmp_path / "a", "t", list(range(5 + extra))), write(tmp_path / "b", "t", list(range(5)))
    rows = "row" if extra == 1 else "rows"
    with pytest.raises(UserError, match=rf"{5 + extra} and 5 rows; {extra} {rows} only in \S+a/eval/t \(id {shown}\)$"):
        choose_results([a, b])


@pytest.mark.parametrize("order", [1, -1])
def test_other_kinds_of_labels_are_refused_in_either_order(tmp_path, order: int):
    types = ["multi_label", "regression"][::order]
    runs = [write(tmp_path / kind, "t", [0], task_type=kind) for kind in types]
    with pytest.raises(UserError, match=f"one is of {types[0]}, the other of {types[1]}"):
        choose_results(runs)


@pytest.mark.parametrize(("length", "cut"), [(20, False), (58, False), (59, True), (200, True)])
def test_values_that_differ_are_quoted_up_to_60_characters(tmp_path, length: int, cut: bool):
    texts = ["x" * length, "y" * length]
    for run, text in zip("ab", texts, strict=True):
        row = {"id": 0, "prompt": text, "reference": "r", "text": "t"}
        facts = {"kind": "generation", "model": "m", "dataset_name": "d", "dataset_split": "s"}
        write_result(tmp_path / run / "eval" / "t", facts, Scores({}, {}), [row], ["same"])
    quoted = [f"'{text}'" if not cut else f"'{text}"[:57] + "..." for text in texts]
    with pytest.raises(UserError) as refused:
        choose_results([tmp_path / "a", tmp_path / "b"])
    assert str(refused.value).endswith(f"row 0 has the prompt {quoted[0]} in one and {quoted[1]} in the other")


def test_classes_are_aligned_by_their_names():
    rows = [{"label": 0, "prediction": 1, "probabilities": [0.2, 0.5, 0.3]}, {"label": 2, "probabilities": [0, 0, 1]}]
    first = result(rows, label_names=["a", "b", "c"])
    same, unnamed = result(rows, label_names=["a", "b", "c"]), result(rows)
    assert with_classes_of(first, same) is same
    assert with_classes_of(first, unnamed) is unnamed and with_classes_of(unnamed, same) is same
    for names, expected in ((["c", "a", "b"], [0.5, 0.3, 0.2]), (["b", "c", "a"], [0.3, 0.2, 0.5])):
        turned = with_classes_of(first, result(rows, label_names=names, label_thresholds=[0.1, 0.2, 0.3]))
        assert turned.facts["label_names"] == ["a", "b", "c"]
        place = [["a", "b", "c"].index(name) for name in names]
        found = turned.predictions[0]
        assert (found["label"], found["prediction"], found["probabilities"]) == (place[0], place[1], expected)
        assert turned.facts["label_thresholds"] == [[0.1, 0.2, 0.3][names.index(name)] for name in "abc"]
    with pytest.raises(UserError, match=r"the classes are .*a.* in one and .*z.* in the other"):
        with_classes_of(first, result(rows, label_names=["a", "b", "z"]))


def test_a_row_of_several_labels_is_right_where_all_of_them_are():
    rows = [
        {"label": [0, 2], "probabilities": [0.9, 0.2, 0.8]},
        {"label": [0], "probabilities": [0.9, 0.2, 0.8]},  # one too many
        {"label": [0, 1], "probabilities": [0.9, 0.2, 0.1]},  # one too few
        {"label": [], "probabilities": [0.1, 0.2, 0.1]},
    ]
    found = measure_rows(result(rows, task_type="multi_label"), None)
    assert found.right.tolist() == [True, False, False, True]
    assert (found.right_means, found.classes) == ("exact_match", 3)
    assert found.scores == pytest.approx([-0.5, -1.1, -1.0, -0.4])
    assert values([found.statistics["exact_match"]])["exact_match"] == 0.5


def test_a_number_is_more_or_less_wrong_and_no_row_is_right():
    rows = [{"label": 1.0, "prediction": 1.0}, {"label": 2.0, "prediction": -1.0}]
    found = measure_rows(result(rows, task_type="regression"), None)
    assert found.scores.tolist() == [0.0, -3.0]
    assert found.right.tolist() == [False, False]
    assert (found.right_means, found.classes) == ("", None)


def test_likelihoods_are_put_together_from_what_each_row_says():
    """Of 12 and 30 nats, 4 and 20 tokens, 15 and 40 bytes."""
    parts, same = [(12.0, 4, 15), (30.0, 20, 40)], {"text": "a", "reference": "a"}
    rows = [
        {"nll": nll, "perplexity": math.exp(nll / tokens), "bits_per_byte": nll / count / math.log(2), **same}
        for nll, tokens, count in parts
    ]
    found = values(
        list({id(s): s for s in measure_rows(result(rows, kind="generation"), None).statistics.values()}.values())
    )
    assert found["perplexity"] == pytest.approx(math.exp(42 / 24))
    assert found["bits_per_byte"] == pytest.approx(42 / 55 / math.log(2))
    del rows[1]["nll"]
    assert "perplexity" not in measure_rows(result(rows, kind="generation"), None).statistics


def test_an_answer_s_end_is_compared_only_where_every_row_says_whether_it_ended():
    rows: list[dict[str, Any]] = [{"text": "a", "reference": "a", "ended": 1.0}, {"text": "b", "reference": "b"}]
    assert "ended" not in measure_rows(result(rows, kind="generation"), None).statistics
    rows[1]["ended"] = 0.0
    statistics = measure_rows(result(rows, kind="generation"), None).statistics
    assert values([statistics["ended"]])["ended"] == 0.5


BROKEN = [
    {"label": 0},
    {"probabilities": [1.0, 0.0]},
    {"label": 0, "probabilities": [None, {}]},
    {"label": 0, "probabilities": [0.5]},
    {"label": 10**30, "probabilities": [1.0, 0.0]},
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_row_without_what_is_compared_is_named_by_its_file(broken: dict[str, Any]):
    with pytest.raises(UserError, match=r"run/eval/test/predictions\.jsonl: "):
        measure_rows(result([LABELLED, broken]), None)


@pytest.mark.parametrize(
    ("task_type", "broken"),
    [
        ("multi_label", {"label": [0]}),
        ("multi_label", {"label": [5], "probabilities": [0.1, 0.2]}),
        ("multi_label", {"label": None, "probabilities": None}),
        ("multi_label", {"label": None, "probabilities": [0.1, 0.2]}),
        ("multi_label", {"label": [-1], "probabilities": [0.1, 0.2]}),
        ("multi_label", {"label": [True, False], "probabilities": [0.1, 0.2]}),
        ("multi_label", {"label": 1, "probabilities": [0.1, 0.2]}),
        ("regression", {"label": 1.0}),
        ("regression", {"label": 1.0, "prediction": {}}),
    ],
)
def test_so_is_one_of_labels_or_numbers(task_type: str, broken: dict[str, Any]):
    with pytest.raises(UserError, match=r"predictions\.jsonl: a row has no label or prediction, or other labels"):
        measure_rows(result([broken], task_type=task_type), None)


def test_a_text_without_its_reference_and_a_kind_that_is_unknown_are_refused():
    with pytest.raises(UserError, match=r"run/eval/test/predictions\.jsonl: a row has no 'reference'"):
        measure_rows(result([{"text": "a"}], kind="generation"), None)
    for kind in ("attribution", "zero", "d"):
        with pytest.raises(UserError, match=f"a result of the kind '{kind}' cannot be compared"):
            measure_rows(result([LABELLED], kind=kind), None)


def test_classes_are_right_by_the_largest_probability():
    rows = [{"label": 1, "probabilities": [0.2, 0.8]}, {"label": 0, "probabilities": [0.3, 0.7]}]
    found = measure_rows(result(rows), None)
    assert found.right.tolist() == [True, False] and found.scores.tolist() == [0.8, 0.3]
    assert (found.right_means, found.classes) == ("accuracy", 2)
    grouped = measure_rows(result(rows), np.array([0, 0]))
    assert values([grouped.statistics["accuracy"]])["accuracy"] == 0.5
