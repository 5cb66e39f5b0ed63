"""One recipe, any engine: losses, gradient norms and final weights of real runs from the shipped configurations."""

import json
from pathlib import Path

import pytest
from tests.distributed.engines import ENGINES, PLAIN, Engine, config_of, deviation, engine, recipes
from tests.launching import Finished, start_together

RELATIVE = 1e-5  # of a loss, and of a gradient norm in the first steps
WEIGHTS = 1e-3  # of what training moved a tensor by: AdamW makes whole steps of gradients that are only rounding
COMPACT = ("ZeRO-3 on 2", "FSDP2 on 2")
# in short: FSDP2 in test_world_sizes.py, ZeRO in test_resume.py
pytestmark = pytest.mark.slow


class Runs:
    """Each engine is launched once, for full and LoRA, however many tests look at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipes = recipes(folder)
        self.base = folder / "opt"
        self._done: dict[str, dict[str, Finished]] = {}

    def of(self, one: Engine) -> dict[str, Finished]:
        """The finished runs, by `full` and `lora`."""
        if one.name not in self._done:
            place = self.folder / one.name.replace(" ", "_")
            config = config_of(one, self.folder)
            self._done[one.name] = start_together(
                place, self.recipes, processes=one.processes, config=config, counted_step=2
            )
        return self._done[one.name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Shared by all tests of this file."""
    return Runs(tmp_path_factory.mktemp("engines"))


def assert_as_asked(one: Engine, finished: Finished) -> None:
    found = finished.environment["in_effect"]
    assert (found["kind"], found["zero_stage"]) == (one.kind, one.zero_stage)
    assert found["world_size"] == max(one.processes, 1)
    assert found["offload"] == (["optimizer", "param"] if "offload" in one.name else [])
    assert (found["precision"], found["max_grad_norm"], found["accumulation"]) == ("no", 1.0, 1)
    assert found["optimizer"] == "AdamW"


def check(runs: Runs, one: Engine) -> dict[str, dict]:
    """Compare an engine's runs with plain's, and say how far they were apart."""
    table = {}
    for tune, finished in runs.of(one).items():
        plain = runs.of(PLAIN)[tune]
        assert_as_asked(one, finished)
        assert [x["learning_rate"] for x in finished.steps] == [x["learning_rate"] for x in plain.steps]
        apart = deviation(plain, finished, runs.base)
        table[f"{one.name}, {tune}"] = vars(apart)
        assert apart.loss <= RELATIVE and apart.eval_loss <= RELATIVE, (one.name, tune, apart)
        assert apart.early_norm <= RELATIVE, (one.name, tune, apart)
        assert apart.weights <= WEIGHTS, (one.name, tune, apart)
    return table


@pytest.mark.parametrize("name", COMPACT)
def test_an_engine_trains_as_one_plain_process_does(runs: Runs, name):
    check(runs, engine(name))


@pytest.mark.parametrize("name", COMPACT)
def test_a_rank_holds_its_share_only(runs: Runs, name):
    plain = runs.of(PLAIN)["full"].environment["in_effect"]
    found = runs.of(engine(name))["full"].environment["in_effect"]
    assert found["all_parameters"] == found["trained_parameters"] == plain["all_parameters"]
    assert found["optimized_numbers_per_rank"] <= 0.51 * plain["optimized_numbers_per_rank"]
    share = found["parameter_bytes_per_rank"] / plain["parameter_bytes_per_rank"]
    assert share == 1.0 if name == "ZeRO-2 on 2" else share < 0.6


@pytest.mark.parametrize("name", COMPACT)
def test_the_first_lines_say_what_is_in_effect(runs: Runs, name):
    one = engine(name)
    finished = runs.of(one)["full"]
    line = next(line for line in finished.stdout.splitlines() if line.startswith("engine "))
    assert finished.environment["in_effect"]["engine"] in line and " on 2 x " in line
    assert (f"ZeRO-{one.zero_stage}" in line) is (one.zero_stage is not None)
    assert "numbers in AdamW" in finished.stdout


def test_the_whole_matrix_and_its_table(runs: Runs):
    table: dict[str, dict] = {}
    for one in ENGINES:
        table |= check(runs, one)
    largest = {key: max(row[key] for row in table.values()) for key in next(iter(table.values()))}
    text = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |"
        for name, row in [*table.items(), ("largest", largest)]
    )
    print(f"\n| run | {' | '.join(largest)} |\n{text}")
    (runs.folder / "matrix.json").write_text(json.dumps(table))
