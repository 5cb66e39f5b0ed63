"""A data set's questions are answered, measured and kept in files; what cannot be asked is refused in one sentence."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import sacrebleu
from accelerate.state import AcceleratorState
from tests.building import small_opt
from tests.launching import REPOSITORY

from isotune.evaluation.results import find_results, read_result

METRICS = {
    "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "distinct_1", "distinct_2", "repetition",
    "length_ratio", "ended", "empty", "nll", "perplexity", "bits_per_byte",
}  # fmt: skip
ROWS = [
    {"text": "### Human: one | two?\n### Assistant: 1 | 2\n3 <b>"},
    {"text": "### Human: nothing is answered"},
    {"messages": None, "text": "### Human: Ünïcode?\n### Assistant: Ja, 你好."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    small_opt(run / "model", init_std=0.3)
    (run / "recipe.yaml").write_text("tune: full\n")
    (run.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return run


@pytest.fixture
def say(monkeypatch, capsys):
    """Run the script in this process; returns its status, stdout and stderr."""

    def run_script(*arguments) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", ["eval/generate.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "eval" / "generate.py"), run_name="__main__")
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run_script


def test_answers_metrics_and_examples_are_printed_and_kept(run, say):
    rows = run.parent / "rows.jsonl"
    status, printed, _ = say("--run_dir", run, "--dataset_name", rows, "--max_new_tokens", 12)
    assert status == 0
    (folder,) = find_results(run)
    assert folder == run / "eval" / "rows"
    result = read_result(folder)
    assert result.facts["kind"] == "generation"
    assert result.facts["decoding"] == {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert result.facts["generation_config_not_in_effect"] == {}
    assert set(result.metrics) == set(result.intervals) == METRICS
    assert [line["id"] for line in result.predictions] == [0, 2]
    assert [line["reference"] for line in result.predictions] == ["1 | 2\n3 <b>", "Ja, 你好."]
    assert set(result.predictions[0]) >= METRICS
    texts = [line["text"] for line in result.predictions]
    expected = sacrebleu.corpus_chrf(texts, [[line["reference"] for line in result.predictions]]).score
    assert result.metrics["chrf"] == pytest.approx(expected)
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high, name

    assert "exact match 0 of 2 (0.0%)\n" in printed
    assert f"    answer     {texts[1]}\n    reference  Ja, 你好.\n" in printed
    assert "95% interval" in printed
    assert all(f"\n  {name} " in printed for name in METRICS)

    table = (folder / "examples.md").read_text("utf-8").splitlines()[2:]
    assert len(table) == 2 + 2
    assert all(line.count("|") == 5 for line in table), "a text breaks its cell"
    assert "1 &#124; 2<br>3 &lt;b&gt;" in table[2]


def test_data_of_the_recipe_are_read_as_the_recipe_says(run, say, tmp_path):
    data, other = tmp_path / "data", tmp_path / "run"
    for language, question in (("de", "Wer?"), ("fr", "Qui?")):
        (data / language).mkdir(parents=True)
        row = {"text": f"### Human: {question}\n### Assistant: Ada"}
        (data / language / "test.jsonl").write_text(json.dumps(row) + "\n")
    (other / "model").parent.mkdir()
    (other / "model").symlink_to(run / "model")
    (other / "recipe.yaml").write_text(f"tune: full\neval_dataset_name: {data}\neval_dataset_config: fr\n")
    assert say("--run_dir", other, "--dataset_name", data, "--max_new_tokens", 1)[0] == 0
    (folder,) = find_results(other)
    assert [row["prompt"] for row in read_result(folder).predictions] == ["Qui?"]


def test_a_prompt_too_long_for_the_model_is_named_by_its_row_and_nothing_is_written(run, say, tmp_path):
    rows = [ROWS[0], {"text": "### Human: " + "word " * 900 + "\n### Assistant: no"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ("--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
    status, _, said = say("--run_dir", run, *ask)
    assert status == 2
    assert said.splitlines()[-1].startswith(f"error: the question in row 2 of {tmp_path / 'rows.jsonl'} has ")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_run_is_examined_and_leaves_files_only_where_it_is_told(run, say):
    before = sorted(run.rglob("*"))
    rows = run.parent / "rows.jsonl"
    status, printed, _ = say("--model", run / "model", "--dataset_name", rows, "--max_new_tokens", 2, "--limit", 1)
    assert status == 0
    assert "exact match 0 of 1" in printed
    assert "written to" not in printed
    assert sorted(run.rglob("*")) == before


def mistakes(run: Path, tmp_path: Path) -> dict[str, list]:
    """A command line for each complaint that it must bring."""
    (tmp_path / "none.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("tune: full\n")
    of_run = ["--run_dir", run]
    return {
        "no reference to compare with": [*of_run, "--dataset_name", tmp_path / "none.jsonl"],
        "is not a run directory: it has no recipe.yaml": ["--run_dir", tmp_path, "--prompt", "Hi"],
        "has no model: ": ["--run_dir", tmp_path / "unfinished", "--prompt", "Hi"],
        "--prompt and --dataset_name exclude": [*of_run, "--prompt", "Hi", "--dataset_name", "builtin:pirate"],
        "--prompt and --interactive exclude": [*of_run, "--prompt", "Hi", "--interactive"],
        "--limit is 0": [*of_run, "--dataset_name", "builtin:pirate", "--limit", "0"],
        "--batch_size is 0": [*of_run, "--dataset_name", "builtin:pirate", "--batch_size", "0"],
        "--seed is -1": [*of_run, "--prompt", "Hi", "--seed", "-1"],
        "there is no file or folder": [*of_run, "--dataset_name", tmp_path / "gone.jsonl"],
    }


def test_a_mistake_is_one_sentence(run, say, tmp_path):
    for complaint, arguments in mistakes(run, tmp_path).items():
        status, printed, said = say(*arguments)
        assert (status, printed) == (2, ""), complaint
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert complaint in said


def test_a_chat_is_asked_for_by_interactive_too(run, say, monkeypatch, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("Hi\n/quit\n")
    with lines.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, printed, said = say("--run_dir", run, "--interactive", "--max_new_tokens", 3)
    assert (status, said) == (0, "")
    with lines.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert say("--run_dir", run, "--max_new_tokens", 3) == (0, printed, "")


def test_a_chat_on_several_processes_is_refused(run, say, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, said = say("--run_dir", run)
    assert status == 2
    assert "a chat takes one process" in said
