"""One of two ranks runs out of memory: both repeat the update in smaller microbatches, and its figures are the same."""

import json
from pathlib import Path

import pytest
import yaml
from tests.building import small_opt
from tests.distributed.engines import relative
from tests.launching import TINY, Finished, start, start_together

SCRIPT = "tests/distributed/short_of_memory.py"  # which says how the runs are short of memory by their names
CASES = ["rank1-backward-last", "rank0-backward-last-exact"]
MORE = ["rank1-forward-earlier", "rank1-backward-earlier-exact"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Finished]:
    """Of CASES and of what nothing disturbed, in one launch, with dropout on."""
    return launch(tmp_path_factory.mktemp("short"), CASES)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory) -> dict[str, Finished]:
    """Of MORE, as `runs`."""
    return launch(tmp_path_factory.mktemp("short"), MORE)


def launch(folder: Path, cases: list[str]) -> dict[str, Finished]:
    model = small_opt(folder / "opt", dropout=0.1, attention_dropout=0.1)
    recipe = {**TINY, "model_name_or_path": model, "global_batch_size": 8, "max_steps": 3, "save_strategy": "no"}
    names = [*cases, "undisturbed", "undisturbed-exact"]
    recipes = {name: {**recipe, "exact_gradients": name.endswith("exact")} for name in names}
    evaluated = {"eval_dataset_name": "builtin:greetings", "eval_steps": 3}
    for name in ("undisturbed", "rank1-evaluation"):
        recipes[name] = recipes["undisturbed"] | evaluated
    return start_together(folder, recipes, processes=2, script=SCRIPT)


@pytest.mark.parametrize(
    ("launched", "case"),
    [
        *(("runs", case) for case in CASES),
        *(pytest.param("more_runs", case, marks=pytest.mark.slow) for case in MORE),
    ],
)
def test_an_update_is_repeated_with_the_figures_of_the_undisturbed_run(request, launched: str, case: str):
    runs: dict[str, Finished] = request.getfixturevalue(launched)
    short, whole = runs[case], runs["undisturbed-exact" if case.endswith("exact") else "undisturbed"]
    assert [line.get("out_of_memory_retries") for line in short.steps] == [None, 1, 1]
    assert not any("out_of_memory_retries" in line for line in whole.steps)
    assert max(relative(whole.steps, short.steps, "loss")) <= 1e-6
    assert max(relative(whole.steps, short.steps, "grad_norm")) <= 1e-6
    recorded = [yaml.safe_load((run.run / "recipe.yaml").read_text())["microbatch_tokens"] for run in (short, whole)]
    assert recorded == [256, 512]


def test_a_line_says_it(runs):
    said = [line for line in runs[CASES[0]].stderr.splitlines() if "microbatch  " in line]
    place = "microbatch  256 tokens from step 2 on, which is repeated: 512 ran out of memory; "
    assert len(said) == len(CASES)
    assert said[0].endswith(place + "it changes rounding only")
    assert said[1].endswith(place + "its bits are those of 256 tokens from here on, to rounding those of 512")


def test_an_evaluation_goes_on_in_halves_on_the_rank_that_is_short_and_has_the_same_loss(runs):
    short, whole = runs["rank1-evaluation"], runs["undisturbed"]
    assert [line.get("out_of_memory_retries") for line in short.steps] == [None] * 3
    assert [line["loss"] for line in short.steps] == [line["loss"] for line in whole.steps]
    (found,), (expected,) = short.evaluations, whole.evaluations
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["eval_supervised_tokens"] == expected["eval_supervised_tokens"]
    said = [line for line in short.stderr.splitlines() if "memory      a batch of " in line]
    assert said and "batches have " in said[0]


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ("fsdp2.yaml", {}),
        slow("zero2.yaml", {}),
        slow("zero3.yaml", {"microbatch_tokens": 512}),
        slow("ddp.yaml", {"microbatch_tokens": 512}),
    ],
)
def test_where_no_rank_can_go_on_without_the_others_one_sentence_has_the_plans_figures(tmp_path: Path, config, values):
    recipe = {**TINY, "global_batch_size": 8, "exact_gradients": False, "save_strategy": "no", "max_steps": 3, **values}
    folder = tmp_path / "rank1-forward-last"
    done = start(folder, recipe, processes=2, config=config, script=SCRIPT, expect=1, environment={"PYTHONPATH": "."})
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: training ran out of memory with microbatches of 512 tokens; the plan is ")
    assert " MiB on a process: lower microbatch_tokens" in said
    assert "OutOfMemoryError" not in done.stderr
    ended = json.loads((done.run / "status.json").read_text())
    assert (ended["status"], ended["exit_status"]) == ("failed", 2) and f"error: {ended['message']}" == said
