"""lm-evaluation-harness runs its local task files on a model, and where it is not installed one sentence says so."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from isotune.evaluation.generation.lm_eval_bridge import check_tasks, run_tasks, write_harness
from isotune.evaluation.models import generation_model_named
from isotune.evaluation.results import read_result
from isotune.io.errors import UserError

DOCUMENTS = [
    {"question": "Once upon a time, there was a little", "choices": [" girl", " quantum"], "answer": 0},
    {"question": "She went to the", "choices": [" parliament", " park"], "answer": 1},
    {"question": "They played with the", "choices": [" algebra", " ball"], "answer": 1},
    {"question": "The sun was", "choices": [" shining", " employed"], "answer": 1},  # wrong on purpose
]


@pytest.fixture
def task(tmp_path) -> Path:
    """A multiple-choice task over a file."""
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    settings = {
        "task": "stories",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "stories.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "stories.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "stories.yaml"


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch, task):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'isotune\[lm-eval\]'"):
        check_tasks(str(task))


def test_a_local_task_is_scored_as_a_plain_loop_scores_it(task, shared_data, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'isotune[lm-eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = str(shared_data / "checkpoints" / "stories260K")
    tasks = check_tasks(str(task))
    scores, predictions = run_tasks(generation_model_named(folder), tasks, limit=None, batch_size=2)
    write_harness(scores, predictions, tmp_path / "eval", model=folder, tasks=tasks)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def log_probability(text: str, choice: str) -> float:
        prompt, whole = (tokenizer(t, return_tensors="pt").input_ids for t in (text, text + choice))
        with torch.no_grad():
            scores = model(whole).logits[0, :-1].log_softmax(-1)
        start = prompt.shape[1]
        return scores[range(start - 1, whole.shape[1] - 1), whole[0, start:]].sum().item()

    right = []
    for document in DOCUMENTS:
        best = max((0, 1), key=lambda i: log_probability(document["question"], document["choices"][i]))
        right.append(float(best == document["answer"]))
    result = read_result(tmp_path / "eval")
    assert [line["acc"] for line in result.predictions] == right
    assert 0 < sum(right) < 4
    assert result.metrics["stories/acc"] == sum(right) / 4
    low, high = result.intervals["stories/acc"]
    assert low < result.metrics["stories/acc"] < high


def test_a_task_that_is_not_there_is_named(task):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'isotune[lm-eval]'")
    with pytest.raises(UserError, match=r"no task file gone\.yaml"):
        check_tasks("gone.yaml")
    with pytest.raises(UserError, match="did you mean arc_easy"):
        check_tasks(f"{task},arc_eazy")
