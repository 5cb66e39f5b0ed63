"""Going on within an epoch lays out only the steps that are left."""

import pytest
from tests.building import build

from isotune.training import training_plan as module


def test_skipped_steps_are_not_laid_out_and_the_rest_is_the_same(tmp_path, monkeypatch):
    loader = build(tmp_path).trainer.get_train_dataloader()
    whole = list(loader)
    laid_out = []
    collate = module.collate
    monkeypatch.setattr(module, "collate", lambda *args: laid_out.append(args) or collate(*args))
    rest = list(loader.skipping(4))
    assert [item["step"] for item in rest] == [item["step"] for item in whole[4:]]
    assert [item["step"].number for item in rest] == [4, 5]
    assert len(laid_out) == sum(len(item["microbatches"]) for item in rest)
    for one, other in zip(rest, whole[4:], strict=True):
        for mine, theirs in zip(one["microbatches"], other["microbatches"], strict=True):
            assert mine["inputs"]["input_ids"].equal(theirs["inputs"]["input_ids"])


@pytest.mark.parametrize("steps", [6, 7])
def test_nothing_is_left_of_an_epoch_that_is_done(tmp_path, steps):
    assert list(build(tmp_path).trainer.get_train_dataloader().skipping(steps)) == []


def test_the_engine_skips_through_the_same_door(tmp_path):
    import transformers.trainer

    loader = build(tmp_path).trainer.get_train_dataloader()
    rest = transformers.trainer.skip_first_batches(loader, 5)
    assert [item["step"].number for item in rest] == [5]
