"""`microbatch_tokens: auto`: what it chooses, when it refuses, and that a run keeps it."""

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tests.launching import TINY, start

from isotune.config import Recipe, RunRecipe
from isotune.io.errors import UserError
from isotune.preflight.microbatch_size import MOST_TOKENS_ON_GPU, choose_microbatch_tokens, launch_that_decides
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.request import DDP, DEEPSPEED, FSDP, PLAIN, Launch, PreflightRequest

GIB = 2**30
LIMIT = 25 * 10**6


def a_gibibyte_and_a_mebibyte_a_token(recipe: RunRecipe, launch: Launch) -> Any:
    """An estimate."""
    return SimpleNamespace(total=GIB + 2**20 * recipe.forward_tokens("microbatch_tokens"))


ONE = Launch(PLAIN, 1)


def chosen(limit: int | None, launch: Launch = ONE, **values: Any) -> int:
    """What is chosen by that estimate."""
    recipe = Recipe.from_values(**{**TINY, "output_dir": "runs/a", "max_seq_length": 1024, **values})
    return choose_microbatch_tokens(recipe, launch, limit, a_gibibyte_and_a_mebibyte_a_token)[0]


@pytest.mark.parametrize(
    ("gib", "tokens"), [(10, 8 * 1024), (9, 4 * 1024), (40, 32 * 1024), (1000, MOST_TOKENS_ON_GPU)]
)
def test_the_largest_size_is_chosen_that_leaves_a_tenth_free_and_helps(gib: int, tokens: int):
    assert chosen(gib * GIB) == tokens  # 1 GiB and tokens / 1024 GiB in 0.9 of the memory


def test_on_cpu_it_is_a_row_and_rows_beyond_what_helps_are_one_too():
    assert chosen(None) == 1024
    assert chosen(1000 * GIB, max_seq_length=50_000) == 50_000


def test_where_not_even_a_row_fits_engines_that_cannot_try_again_refuse():
    assert chosen(GIB) == 1024
    for launch in (Launch(DEEPSPEED, 2, deepspeed_config={"zero_optimization": {"stage": 3}}), Launch(FSDP, 2)):
        with pytest.raises(UserError, match=r"one row of 1024 tokens .* takes 2.00 GiB on a process under .*1.00 GiB"):
            chosen(GIB, launch)


@pytest.mark.parametrize(("values", "same"), [({"tune": "lora"}, True), ({"exact_gradients": True}, True), ({}, False)])
def test_where_bits_are_promised_the_number_of_processes_has_no_say(values: dict[str, Any], same: bool):
    recipe = Recipe.from_values(**{**TINY, "output_dir": "runs/a", **values})
    launches = [launch_that_decides(recipe, Launch(engine, n)) for engine, n in ((PLAIN, 1), (DDP, 2), (DDP, 4))]
    assert len({(launch.engine, launch.world_size) for launch in launches}) == (1 if same else 3)


def in_shares(recipe: RunRecipe, launch: Launch) -> Any:
    """An estimate in which every process has its share of 8 GiB of weights."""
    return SimpleNamespace(total=8 * GIB // launch.world_size + 2**20 * recipe.forward_tokens("microbatch_tokens"))


SHARDING = [
    *(Launch(FSDP, n) for n in (1, 2, 4)),
    Launch(DEEPSPEED, 2, deepspeed_config={"zero_optimization": {"stage": 3}}),
]


@pytest.mark.parametrize(("exact", "tokens"), [(True, [4096] * 4), ("auto", [4096, 8192, 8192, 8192])])
def test_exact_gradients_in_shares_have_the_size_of_a_plain_process(exact: bool | str, tokens: list[int]):
    recipe = Recipe.from_values(**{**TINY, "output_dir": "runs/a", "max_seq_length": 1024, "exact_gradients": exact})
    limit = int(13 * GIB / 0.9)
    assert [choose_microbatch_tokens(recipe, launch, limit, in_shares)[0] for launch in SHARDING] == tokens
    # a plain process has no room for its weights: a row, of which the memory is that of the launch
    limit = int(7 * GIB / 0.9)
    for launch in SHARDING[1:]:
        size, memory = choose_microbatch_tokens(recipe, launch, limit, in_shares)
        assert memory.total <= 7 * GIB and (size == 1024) is (exact is True)


def test_the_plan_of_a_device_names_what_auto_would_choose():
    recipe = Recipe.from_values(**{**TINY, "output_dir": "runs/a"})
    request = PreflightRequest(recipe, Launch(PLAIN, 1), ())
    small = run_preflight(request, limit=LIMIT, show_progress=False)
    assert small.chosen_tokens is not None and 256 <= small.chosen_tokens < MOST_TOKENS_ON_GPU
    assert small.memory.total <= 0.9 * LIMIT < run_preflight(
        PreflightRequest(recipe.with_values(microbatch_tokens=2 * small.chosen_tokens), Launch(PLAIN, 1), ()),
        limit=LIMIT, show_progress=False,
    ).memory.total  # fmt: skip


@pytest.mark.slow
def test_the_plan_of_a_large_device_names_the_largest():
    recipe = Recipe.from_values(**{**TINY, "output_dir": "runs/a"})
    large = run_preflight(PreflightRequest(recipe, Launch(PLAIN, 1), ()), limit=80 * 10**9, show_progress=False)
    assert large.chosen_tokens == MOST_TOKENS_ON_GPU and large.fits


def test_a_run_says_and_records_its_choice_and_a_resumed_one_keeps_it(tmp_path):
    recipe = {**TINY, "max_steps": 2, "save_steps": 1, "resume": "auto"}
    run = start(tmp_path, recipe)
    assert "microbatch  256 tokens, by microbatch_tokens: auto (one row)" in run.stdout
    recorded = run.run / "recipe.yaml"
    assert yaml.safe_load(recorded.read_text())["microbatch_tokens"] == 256

    # as a larger device would have chosen; a checkpoint of it is left
    start(tmp_path / "larger", recipe, "--microbatch_tokens", "512")
    larger, recorded = tmp_path / "larger", tmp_path / "larger/run/recipe.yaml"
    for folder in (larger / "run/model", larger / "run/checkpoints/step-00000002"):
        folder.rename(tmp_path / f"away-{folder.name}")
    again = start(larger, recipe)
    assert "microbatch  512 tokens, by microbatch_tokens: auto (as this run began)" in again.stdout
    began = larger / "run/checkpoints/step-00000001"
    elsewhere = start(tmp_path / "elsewhere", recipe, "--resume", str(began))
    assert "microbatch  512 tokens, by microbatch_tokens: auto (as this run began)" in elsewhere.stdout
    assert yaml.safe_load(recorded.read_text())["microbatch_tokens"] == 512
