"""What a model says, and every metric of it, is the same in any batch, on any number of processes, and under ZeRO-3."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.building import small_opt
from tests.launching import launcher, run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from isotune.evaluation.results import read_result

ROWS = 5  # divided by neither 2 nor 3 nor 7


@dataclass(frozen=True)
class Said:
    """What one evaluation left: its metrics, its lines, and what each rank counted."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    lines: list[dict[str, Any]]
    ranks: list[dict[str, int]]

    @property
    def texts(self) -> list[str]:
        return [line["text"] for line in self.lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with an adapter on a base of few positions; it says different things to different questions."""
    run = tmp_path_factory.mktemp("generation") / "run"
    base = small_opt(run / "base_model", init_std=0.4, max_position_embeddings=64)
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(run / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(run / "model")
    (run / "recipe.yaml").write_text("tune: lora\nmodel_init: random\n")
    questions = [
        "What is the capital of Malta?",
        "Hi",
        "Tell me the capital of France, and Peru.",
        "And?",
        "Why so?",
    ]
    rows = [{"text": f"### Human: {q}\n### Assistant: Arr, {q.split()[-1]} matey!"} for q in questions]
    (run.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def commands(run: Path, folder: Path) -> dict[str, list[str]]:
    """The command lines of one launch, by name."""
    ask = ["--run_dir", str(run), "--dataset_name", str(run.parent / "rows.jsonl"), "--max_new_tokens", "20"]
    drawn = [*ask, "--temperature", "0.8", "--top_p", "0.9", "--seed", "3"]
    named = {
        "greedy, batches of 1": [*ask, "--batch_size", "1"],
        "greedy, batches of 7": [*ask, "--batch_size", "7"],
        "drawn, batches of 2": [*drawn, "--batch_size", "2"],
        "one row": [*ask, "--limit", "1"],
    }
    return {name: [*line, "--output_dir", str(folder / name)] for name, line in named.items()}


def evaluate(folder: Path, run: Path, config: str, processes: int) -> dict[str, Said]:
    folder.mkdir()
    lines = commands(run, folder)
    (folder / "arguments.json").write_text(json.dumps(list(lines.values())))
    runner = ["tests/distributed/generate_in_turn.py", str(folder / "arguments.json")]
    done = run_command([*launcher(config, processes), *runner])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    counted = [
        [json.loads(line) for line in (folder / f"passes-{rank}.jsonl").read_text().splitlines()]
        for rank in range(processes)
    ]
    found = {}
    for number, name in enumerate(lines):
        result = read_result(folder / name)
        ranks = [of_rank[number] for of_rank in counted]
        found[name] = Said(result.metrics, result.intervals, result.predictions, ranks)
    return found


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> dict[str, Said]:
    return evaluate(tmp_path_factory.mktemp("alone") / "single", run, "single.yaml", 1)


def assert_same(found: Said, expected: Said) -> None:
    assert [line["id"] for line in found.lines] == [line["id"] for line in expected.lines]
    assert found.texts == expected.texts
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-6)
    for name, interval in expected.intervals.items():
        assert found.intervals[name] == pytest.approx(interval, rel=1e-5, abs=1e-5), name  # sums of resamples are fp32


def test_the_batch_changes_nothing(alone):
    assert len(set(alone["greedy, batches of 1"].texts)) >= 4, "the fixture says one thing to everything"
    assert alone["drawn, batches of 2"].texts != alone["greedy, batches of 1"].texts
    assert [line["id"] for line in alone["greedy, batches of 1"].lines] == list(range(ROWS))
    assert_same(alone["greedy, batches of 7"], alone["greedy, batches of 1"])


@pytest.mark.parametrize(
    ("config", "processes"),
    [
        ("ddp.yaml", 2),
        *(pytest.param(*several, marks=pytest.mark.slow) for several in (("zero3.yaml", 2), ("ddp.yaml", 3))),
    ],
)
def test_the_processes_change_nothing(run, alone, tmp_path, config, processes):
    found = evaluate(tmp_path / "many", run, config, processes)
    for name, expected in alone.items():
        assert_same(found[name], expected)
    if config == "zero3.yaml":
        for name, said in found.items():
            passes = {rank["passes"] for rank in said.ranks}
            assert len(passes) == 1, f"{name}: a rank that makes fewer passes would leave the others waiting"
            assert all(rank["held"] < 0.6 * rank["whole"] for rank in said.ranks), "the weights lie whole"
    else:
        assert found["one row"].ranks[0]["passes"] > 0
        assert found["one row"].ranks[1]["passes"] == 0, "the row was answered twice"
