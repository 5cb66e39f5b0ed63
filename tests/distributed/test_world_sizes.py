"""The hardware changes, the experiment does not: real processes over gloo, started as users start them."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.building import small_opt
from tests.distributed.engines import changed_zero, recipes
from tests.launching import TINY, Finished, start, start_together

# dropout on, and a global batch that two and three processes do not divide
LORA = {**TINY, "tune": "lora", "lora_dropout": 0.1, "learning_rate": 1e-2}


def weights_hash(finished: Finished) -> str:
    (file,) = finished.run.glob("model/*.safetensors")
    tensors = load_file(file)
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def figures(finished: Finished) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in finished.steps]


SHORT = {"max_steps": 4, "save_strategy": "no"}
EXACT = {"lora": LORA | SHORT, "full": {**TINY, **SHORT, "exact_gradients": True}}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, Finished]:
    """Full and LoRA on one plain process."""
    return start_together(tmp_path_factory.mktemp("one"), EXACT)


@pytest.mark.parametrize("processes", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))])
def test_exact_gradients_give_the_same_bits_on_any_number_of_processes(tmp_path: Path, one_process, processes):
    for tune, several in start_together(tmp_path, EXACT, processes=processes).items():
        assert several.environment["world_size"] == processes
        assert several.environment["in_effect"]["engine"] == "DistributedDataParallel"
        assert several.environment["in_effect"]["exact_gradients"] is True
        assert figures(several) == figures(one_process[tune])
        assert weights_hash(several) == weights_hash(one_process[tune])


# the default, fused AdamW, is refused there: it rounds the end of a share otherwise
SHARED = {"exact_gradients": True, "optim": "adamw_torch", "save_strategy": "no"}


@pytest.mark.slow
def test_they_give_the_same_bits_where_zero_shards_the_optimizer(tmp_path: Path):
    recipes = {tune: {**recipe, **SHARED, "max_steps": 20} for tune, recipe in EXACT.items()}
    one = start_together(tmp_path / "one", recipes)
    for config, processes in (("zero1.yaml", 2), ("zero2.yaml", 3)):
        place = tmp_path / f"{processes}"
        for tune, several in start_together(place, recipes, processes=processes, config=config).items():
            assert several.environment["in_effect"]["exact_gradients"] is True
            assert several.environment["in_effect"]["kind"] == "DeepSpeed"
            assert figures(several) == figures(one[tune])
            assert weights_hash(several) == weights_hash(one[tune])


BOTH = ("full", "lora")


@pytest.fixture(scope="module")
def dropout_everywhere(tmp_path_factory) -> dict[str, dict]:
    """Full and LoRA on one saved model with dropout in attention and blocks, whose weights no engine keeps whole."""
    made = recipes(tmp_path_factory.mktemp("models"), **SHARED)
    return {tune: made[tune] for tune in BOTH}


@pytest.fixture(scope="module")
def one_plain(tmp_path_factory, dropout_everywhere) -> Callable[[Sequence[str]], dict[str, Finished]]:
    """Those of `dropout_everywhere` on one plain process."""

    def runs(tunes: Sequence[str]) -> dict[str, Finished]:
        return start_together(tmp_path_factory.mktemp("plain"), {tune: dropout_everywhere[tune] for tune in tunes})

    return functools.cache(runs)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def zero3_without_persistent_weights(folder: Path) -> str:
    """zero3.yaml, and every weight partitioned between its uses, however small."""
    return changed_zero(folder, "zero3", stage3_param_persistence_threshold=0)


@pytest.mark.parametrize(
    ("config", "processes", "tunes"),
    [
        ("fsdp2.yaml", 2, ("full",)),  # which shards every weight
        slow("fsdp2.yaml", 2, BOTH),
        slow("fsdp2.yaml", 3, BOTH),
        slow("fsdp2.yaml", 4, BOTH),
        slow("zero3.yaml", 2, BOTH),
        slow("zero3.yaml", 3, BOTH),
        slow("zero3.yaml", 4, BOTH),
        slow(zero3_without_persistent_weights, 2, BOTH),
        slow("zero3_offload.yaml", 2, BOTH),
    ],
)
def test_they_give_the_same_bits_where_the_engine_shards_the_gradients(
    tmp_path: Path, dropout_everywhere, one_plain, config, processes, tunes
):
    config, plain = config if isinstance(config, str) else config(tmp_path), one_plain(tunes)
    some = {tune: dropout_everywhere[tune] for tune in tunes}
    for tune, several in start_together(tmp_path, some, processes=processes, config=config).items():
        in_effect = several.environment["in_effect"]
        assert in_effect["exact_gradients"] is True
        assert (
            in_effect["parameter_bytes_per_rank"]
            < 0.7 * plain[tune].environment["in_effect"]["parameter_bytes_per_rank"]
        )
        assert figures(several) == figures(plain[tune])
        assert weights_hash(several) == weights_hash(plain[tune])


@pytest.mark.slow
@pytest.mark.parametrize(("config", "few", "many"), [("fsdp2.yaml", 2, 3), ("zero3.yaml", 1, 2)])
def test_in_bf16_an_engine_that_shards_gives_the_same_bits_on_any_number_of_processes(
    tmp_path: Path, dropout_everywhere, config, few, many
):
    bf16 = {tune: {**recipe, "bf16": True} for tune, recipe in dropout_everywhere.items()}
    first = start_together(tmp_path / "few", bf16, processes=few, config=config)
    for tune, several in start_together(tmp_path / "many", bf16, processes=many, config=config).items():
        assert several.environment["in_effect"]["precision"] == "bf16"
        assert figures(several) == figures(first[tune])
        assert weights_hash(several) == weights_hash(first[tune])


@pytest.mark.slow  # in short: the packed kind of test_drop_in_engines.py
def test_without_them_ddp_agrees_with_one_process_to_rounding(tmp_path: Path):
    recipe = {**TINY, "exact_gradients": False, "eval_dataset_name": "builtin:greetings", "eval_steps": 3}
    one = start(tmp_path / "1", recipe)
    two = start(tmp_path / "2", recipe, processes=2)
    assert len(one.steps) == len(two.steps) == 6
    for a, b in zip(one.steps, two.steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert (a["supervised_tokens"], a["documents"]) == (b["supervised_tokens"], b["documents"])
    for a, b in zip(one.steps[:3], two.steps[:3], strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for a, b in zip(one.evaluations, two.evaluations, strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)


@pytest.mark.slow  # in short: the sizes in tests/numerics/test_document_dropout.py, the processes above
def test_microbatches_of_another_size_on_each_number_of_processes_agree_to_rounding_with_dropout_on(tmp_path: Path):
    model = small_opt(tmp_path / "opt", dropout=0.1, attention_dropout=0.1)
    shared = {**TINY, "model_name_or_path": model, "global_batch_size": 7, "exact_gradients": False, "max_steps": 8}
    recipes = {"full": shared, "lora": {**LORA, **shared, "tune": "lora", "adam_epsilon": 1e-5}}
    found = {
        processes: start_together(
            tmp_path / f"{processes}",
            {tune: {**recipe, "microbatch_tokens": tokens} for tune, recipe in recipes.items()},
            **({"processes": processes} if processes > 1 else {}),
        )
        for processes, tokens in ((1, 256), (2, 512), (3, 768))
    }
    for tune in recipes:
        one = found[1][tune].steps
        for processes in (2, 3):
            several = found[processes][tune].steps
            assert len(several) == 8
            assert [step["loss"] for step in several] == pytest.approx([step["loss"] for step in one], rel=1e-6)
            assert [step["grad_norm"] for step in several] == pytest.approx([s["grad_norm"] for s in one], rel=1e-5)


@pytest.mark.slow
def test_more_processes_than_microbatches_run_and_say_who_idles(tmp_path: Path):
    recipe = {**LORA, "global_batch_size": 1, "max_steps": 3}
    one = start(tmp_path / "1", recipe)
    three = start(tmp_path / "3", recipe, processes=3)
    assert "2 of 3 processes have nothing to do" in three.stdout
    assert figures(three) == figures(one)
