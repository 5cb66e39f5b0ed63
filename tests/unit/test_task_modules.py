"""A task names modules of `evaluate` beside the built-in metrics: their values, intervals and mistakes."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn import metrics as theirs

from isotune.evaluation.metrics.modules import class_columns, score_modules, split_metrics, text_columns
from isotune.evaluation.statistics.resampling import draw_weights
from isotune.evaluation.tasks import ClassificationTask, GenerationTask, read_task
from isotune.io.errors import UserError

MODULE = """
import datasets
import evaluate


class Local(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features({FEATURES})
        )

    def _compute(self, **given):
        COMPUTE
"""
STRING, INT = 'datasets.Value("string")', 'datasets.Value("int32")'
GENERATOR = np.random.default_rng(4)
LABELS, PROBABILITIES = GENERATOR.integers(0, 3, 40), GENERATOR.dirichlet([1, 1, 1], 40)


def write_module(folder: Path, features: str, compute: str, name: str = "local") -> str:
    (folder / name).mkdir()
    text = MODULE.replace("{FEATURES}", f"{{{features}}}").replace("COMPUTE", compute)
    (folder / name / f"{name}.py").write_text(text)
    return str(folder / name)


def write_task(folder: Path, *metrics: object) -> Path:
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump({"dataset_name": "builtin:opinions", "metrics": list(metrics)}))
    return file


def test_a_module_of_classes_has_its_own_value_and_the_interval_of_its_resamples(repository, tmp_path):
    macro = {"module": str(repository / "eval" / "metrics" / "isotune"), "config_name": "f1", "average": "macro"}
    task = read_task(ClassificationTask, write_task(tmp_path, "accuracy", macro), {})
    names, modules = split_metrics(task.metrics)
    assert names == ["accuracy"]
    scores = score_modules(modules, class_columns(LABELS, PROBABILITIES), 40, resamples=100, seed=5)
    predictions = PROBABILITIES.argmax(axis=1)
    assert scores.metrics == {"isotune/f1": pytest.approx(theirs.f1_score(LABELS, predictions, average="macro"))}
    weights = np.concatenate(list(draw_weights(40, 100, 5)))
    drawn = [np.repeat(np.arange(40), row) for row in weights]
    each = [theirs.f1_score(LABELS[rows], predictions[rows], average="macro") for rows in drawn]
    low, high = scores.intervals["isotune/f1"]
    assert np.quantile(each, 0.001) <= low < np.quantile(each, 0.2) < np.quantile(each, 0.8) < high <= max(each)
    assert scores.modules == [
        {"module": macro["module"], "config_name": "f1", "arguments": {"average": "macro"}, "metrics": ["isotune/f1"],
         "resamples": 100}
    ]  # fmt: skip


def test_a_module_is_computed_on_at_most_200_resamples(repository, tmp_path):
    entry = {"module": str(repository / "eval" / "metrics" / "isotune"), "config_name": "accuracy", "name": "mine"}
    _, modules = split_metrics(read_task(ClassificationTask, write_task(tmp_path, entry), {}).metrics)
    scores = score_modules(modules, class_columns(LABELS[:5], PROBABILITIES[:5]), 5, resamples=2000)
    assert scores.modules[0]["resamples"] == 200 and list(scores.metrics) == ["mine/accuracy"]


def test_a_module_of_texts_takes_the_columns_that_its_features_name(tmp_path):
    features = f'"predictions": {STRING}, "references": datasets.Sequence({STRING}), "sources": {STRING}'
    compute = (
        'rows = zip(given["predictions"], given["references"], given["sources"])\n'
        '        return {"hits": sum(p in r and len(s) > 1 for p, r, s in rows), "list": [1], "none": None}'
    )
    task = read_task(GenerationTask, write_task(tmp_path, write_module(tmp_path, features, compute), "chrf"), {})
    names, modules = split_metrics(task.metrics)
    columns = text_columns(["a", "b", "c"], ["a", "x", "c"], ["long", "long", "s"])
    scores = score_modules(modules, columns, 3)
    assert (names, scores.metrics) == (["chrf"], {"local/hits": 1.0})


def test_a_resample_without_a_result_is_left_out(tmp_path):
    features = f'"predictions": {INT}, "references": {INT}'
    compute = (
        'if len(set(given["references"])) < 2:\n            raise ValueError("one class")\n'
        '        return {"mean": sum(given["predictions"]) / len(given["predictions"])}'
    )
    task = read_task(ClassificationTask, write_task(tmp_path, write_module(tmp_path, features, compute)), {})
    labels, probabilities = np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]])
    scores = score_modules(split_metrics(task.metrics)[1], class_columns(labels, probabilities), 2)
    assert scores.metrics == {"local/mean": 0.5} and scores.intervals == {"local/mean": (0.5, 0.5)}


@pytest.mark.parametrize(
    ("features", "compute", "complaint"),
    [
        (f'"predictions": {STRING}, "references": {INT}', "return {}", r"takes predictions \(string\), references"),
        (f'"predictions": {INT}, "answers": {INT}', "return {}", r"no metric '.*local' here: the module takes"),
        (f'"predictions": {INT}, "references": {INT}', "return {'report': 'good'}", "returns no number"),
        (f'"predictions": {INT}, "references": {INT}', "return 1 / 0", "cannot be computed: division by zero"),
        (f'"predictions": {INT} "references"', "return {}", "local' cannot be loaded"),
    ],
)
def test_a_module_that_does_not_fit_is_one_sentence_with_file_key_and_module(tmp_path, features, compute, complaint):
    file = write_task(tmp_path, write_module(tmp_path, features, compute))
    with pytest.raises(UserError, match=complaint) as mistake:
        task = read_task(ClassificationTask, file, {})
        score_modules(split_metrics(task.metrics)[1], class_columns(LABELS, PROBABILITIES), 40)
    sentence = str(mistake.value)
    assert sentence.startswith(f"{file}: metrics: ") and str(tmp_path / "local") in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        (["no/such/folder"], "there is no metric 'no/such/folder': it is not built in"),
        ([{"config_name": "f1"}], "is no metric: it takes a name, or a mapping with `module`"),
        ([{"module": "MODULE", "config_name": "f2"}], "cannot be loaded: the configuration is 'f2'"),
        ([{"module": "MODULE", "config_name": n} for n in ("f1", "recall")], "two modules are called 'isotune'"),
    ],
)
def test_a_wrong_entry_is_named(repository, tmp_path, monkeypatch, entries, complaint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = str(repository / "eval" / "metrics" / "isotune")
    entries = [{**e, "module": module} if isinstance(e, dict) and "module" in e else e for e in entries]
    with pytest.raises(UserError, match=complaint):
        read_task(ClassificationTask, write_task(tmp_path, *entries), {})
