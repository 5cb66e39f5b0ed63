"""`precision: auto` chooses by the device once, and a run that goes on keeps what was chosen."""

import pytest
import torch

from isotune.config import Recipe
from isotune.distributed import precision
from isotune.distributed.precision import best_precision, check_same_precision, cost_of_emulation, with_precision
from isotune.io.errors import UserError

AUTO = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "precision": "auto", "device": "cpu"}


def processor(monkeypatch, **has: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)


@pytest.mark.parametrize(
    ("has", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "no")]
)
def test_a_processor_computes_in_bf16_where_it_has_the_instructions(monkeypatch, has, expected):
    processor(monkeypatch, **has)
    assert best_precision("cpu") == expected
    chosen = with_precision(Recipe.from_values(**AUTO), {})
    assert (chosen.mixed_precision, chosen.precision) == (expected, None)
    assert "precision" not in chosen.resolved()  # recipe.yaml says what was chosen, not how


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_without_bf16_computes_in_fp16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert best_precision("cuda") == expected


@pytest.mark.parametrize("recorded", [{"bf16": True}, {"fp16": True}, {"seed": 1}])
def test_what_was_chosen_once_is_kept_on_another_device(monkeypatch, recorded):
    processor(monkeypatch, avx512_bf16=not recorded.get("bf16", False))
    chosen = with_precision(Recipe.from_values(**AUTO), recorded)
    assert {name: value for name, value in (("bf16", chosen.bf16), ("fp16", chosen.fp16)) if value} == {
        name: True for name in recorded if name != "seed"
    }


def test_ranks_that_chose_another_precision_are_refused(monkeypatch):
    others = {"no": 0, "fp16": 1, "bf16": 2}
    recipe = Recipe.from_values(**{**AUTO, "precision": None, "bf16": True})

    def least(other: str):  # of two ranks, of which the other has its own number
        numbers = {others["bf16"]: others[other], -others["bf16"]: -others[other]}
        return lambda mine, device: min(mine, numbers[mine])

    monkeypatch.setattr(precision, "least_of_ranks", least("bf16"))
    check_same_precision(recipe, torch.device("cpu"))
    for other in ("no", "fp16"):
        monkeypatch.setattr(precision, "least_of_ranks", least(other))
        with pytest.raises(UserError, match="bf16 on some ranks, not on others"):
            check_same_precision(recipe, torch.device("cpu"))


def test_the_cost_of_emulated_bf16_is_said_and_nothing_of_other_runs(monkeypatch):
    cpu = torch.device("cpu")
    in_bf16 = Recipe.from_values(**{**AUTO, "precision": None, "bf16": True})
    processor(monkeypatch, avx2=True)
    assert "bf16 is emulated on this processor" in str(cost_of_emulation(in_bf16, cpu))
    assert cost_of_emulation(Recipe.from_values(**{**AUTO, "precision": None}), cpu) is None
    processor(monkeypatch, avx512_bf16=True)
    assert cost_of_emulation(in_bf16, cpu) is None


def test_a_precision_beside_auto_is_refused():
    with pytest.raises(UserError, match="say one of them: auto chooses by the device"):
        Recipe.from_values(**{**AUTO, "bf16": True})
