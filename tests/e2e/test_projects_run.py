"""docs/projects.md, row by row: each command runs on a few rows of the data and leaves what the page names."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.building import small_opt
from tests.e2e.test_arena_script import ENCODER, SMALL_GRIDS, first_rows
from tests.launching import run_command
from tests.projects_page import Row, read_page

ROWS = read_page()
PROJECTS = list(dict.fromkeys(row.project for row in ROWS))
THIS = "tests/e2e/test_projects_run.py"
TRAINING = ("isotune classify", "isotune sft", "isotune arena")
# a cluster, a server that does not end, weights in 4 bits: the tests that the page names beside these rows try them
ELSEWHERE = ("sbatch", "isotune serve", "isotune sft opt350m_qlora")
CLASSIFIER = {
    "model_name_or_path": "builtin:bert-tiny", "bf16": "false", "max_seq_length": "64", "microbatch_tokens": "1024",
    "num_train_epochs": "1", "warmup_steps": "0", "disable_tqdm": "true",
}  # fmt: skip
EVALUATED = {"eval_microbatch_tokens": "1024"}


def write_jsonl(source: Path, folder: Path, counts: dict[str, int], keep: Callable[[dict], bool]) -> str:
    """The first rows of each split that are short enough, in a folder with the name of the data set."""
    folder.mkdir(parents=True)
    for split, count in counts.items():
        lines = (source / f"{split}.jsonl").open(encoding="utf-8")
        rows = [line for line in lines if keep(json.loads(line))][:count]
        (folder / f"{split}.jsonl").write_text("".join(rows), "utf-8")
    return str(folder)


@pytest.fixture
def small(tmp_path, shared_data) -> dict[str, dict[str, str]]:
    """By recipe the flags that make it small: a tiny model, and a few rows of the real data under its own name."""
    short: Callable[[dict], bool] = lambda row: len(row["text"]) < 600  # noqa: E731
    counts = {"train": 40, "test": 16}
    prompts = tmp_path / "awesome-chatgpt-prompts"
    prompts.mkdir()
    (prompts / "train.csv").write_bytes((shared_data / "prompts" / "prompts.csv").read_bytes())
    arena = tmp_path / "data" / "arena"
    arena.mkdir(parents=True)
    for name, count in (("train", 48), ("test", 24), ("sample_submission", 24), ("test_labels", 24)):
        first_rows(shared_data / "arena" / f"{name}.csv", arena / f"{name}.csv", count)
    first_rows(arena / "train.csv", tmp_path / "battles.csv", 5)
    yelp = write_jsonl(shared_data / "yelp", tmp_path / "yelp_review_full", counts, short)
    imdb = write_jsonl(shared_data / "imdb", tmp_path / "imdb", counts, lambda row: len(row["text"]) < 900)
    (tmp_path / "reviews.jsonl").write_bytes((Path(imdb) / "test.jsonl").read_bytes())
    chats = write_jsonl(shared_data / "guanaco", tmp_path / "openassistant-guanaco", {"train": 24, "test": 4}, short)
    opt = {"model_name_or_path": small_opt(tmp_path / "opt"), "bf16": "false", "dataset_name": chats, "max_steps": "2",
           "eval_dataset_name": chats, "max_seq_length": "256", "microbatch_tokens": "512", "warmup_steps": "0",
           "disable_tqdm": "true"}  # fmt: skip
    of_imdb = CLASSIFIER | EVALUATED | {"dataset_name": imdb, "eval_dataset_name": imdb}
    return {
        "prompts_bert": CLASSIFIER | {"dataset_name": str(prompts)},
        "yelp_bert": CLASSIFIER | EVALUATED | {"dataset_name": yelp, "eval_dataset_name": yelp},
        "imdb_distilbert": of_imdb,
        "imdb_bert": of_imdb,
        "opt350m_lora": opt,
        "opt350m_full": opt,
        "arena_bert": {name: str(value).lower() if value is True else str(value) for name, value in ENCODER.items()}
        | {
            "dataset_name": str(arena),
            "bf16": "false",
            "tune": "full",
            "warmup_steps": "0",
            "eval_microbatch_tokens": "512",
        },
        "arena_baselines": {"dataset_name": str(arena), "folds": "2", "grids": json.dumps(SMALL_GRIDS)},
    }


def typed(row: Row, small: dict[str, dict[str, str]], place: Path) -> list[str]:
    """The words of a row with its files below `place`, and behind those of training the flags that make it small."""
    words = [str(place / word) if word.startswith(("runs/", "data/")) else word for word in row.words[1:]]
    words = [str(place / word) if word in ("battles.csv", "reviews.jsonl") else word for word in words]
    if row.command in TRAINING:
        recipe = row.words[2]
        flags = small[recipe] if "--output_dir" in words else small[recipe] | {
            "output_dir": str(place / "runs" / recipe)}  # fmt: skip
        words += [word for name, value in flags.items() for word in (f"--{name}", value)]
    if row.command == "isotune eval" and "guanaco" in words:
        words += ["--dataset_name", small["opt350m_lora"]["dataset_name"]]
    return [sys.executable, "-m", "isotune.cli", *words]


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_each_row_of_a_project_runs_and_leaves_the_files_that_it_names(project, tmp_path, small):
    rows = [row for row in ROWS if row.project == project]
    tried = [row for row in rows if not " ".join(row.words).startswith(ELSEWHERE)]
    assert all(row.test != THIS for row in rows if row not in tried)
    for row in tried:
        done = run_command(typed(row, small, tmp_path))
        assert done.returncode == 0, f"{' '.join(row.words)}\n{done.stdout}\n{done.stderr}"
        missing = [file for file in row.files if not (tmp_path / file).exists()]
        assert not missing, f"{' '.join(row.words)} leaves no {missing}\n{done.stdout}"
        if not row.files:
            assert done.stdout.strip(), " ".join(row.words)
