"""A dataset that somebody packed before: its documents do not see each other, as TRL's `seq_lengths` say."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.numerics.test_drop_in import QUIET, STEPS, llama
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments, default_data_collator

import isotune
from isotune.data.datasets import collated, documents_of
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

LENGTHS = [[5, 9, 4], [12], [3, 8], [7, 7]]


def packed(column: str) -> Dataset:
    draw = np.random.default_rng(0)
    ids = [draw.integers(5, len(builtin_tokenizer("builtin:opt-tiny")), sum(row)).tolist() for row in LENGTHS]
    beside: list[Any] = LENGTHS
    if column == "position_ids":
        beside = [[position for length in row for position in range(length)] for row in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, column: beside})


def trainer_of(folder: Any, dataset: Dataset, **more: Any) -> Any:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = TrainingArguments(output_dir=str(folder), **QUIET, **{**STEPS, "max_steps": 1}, **split)
    return isotune.Trainer(model=llama(), args=args, train_dataset=dataset, **more)


def mean_loss_of_each_document_alone(dataset: Dataset) -> float:
    """By the stock model, one document a call: the mean over all tokens that have one before them."""
    model, losses = llama().eval(), []
    for ids, lengths in zip(dataset["input_ids"], LENGTHS, strict=True):
        for document in torch.tensor(ids).split(lengths):
            logits = model(input_ids=document[None]).logits[0, :-1]
            losses += cross_entropy(logits, document[1:], reduction="none").tolist()
    return float(np.mean(losses))


@pytest.mark.parametrize("column", ["seq_lengths", "position_ids"])
def test_documents_of_packed_rows_are_learnt_each_alone(column: str, tmp_path):
    dataset = packed(column)
    trainer = trainer_of(tmp_path, dataset)
    trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert loss == pytest.approx(mean_loss_of_each_document_alone(dataset), rel=1e-6)
    assert len(trainer.plan.schedule.step(0).microbatches[0].documents) > 1
    assert trainer.plan.schedule.steps_per_epoch == 1  # four rows, not eight documents
    before = trainer_of(tmp_path, dataset).evaluate(dataset)
    assert before["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"seq_lengths": [[2, 3], [4]]}, "row 2 of the dataset has seq_lengths of other input_ids"),
        ({"seq_lengths": [[2, 3], [5, 0]]}, "row 2 of the dataset has seq_lengths of other input_ids"),
        ({"position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 4, 5]]}, "row 2 of the dataset has position_ids that do not"),
        ({"position_ids": [[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]]}, "row 1 of the dataset has position_ids that do not"),
    ],
)
def test_lengths_and_positions_of_other_documents_are_refused(columns: dict[str, Any], said: str, tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9]] * 2, **columns})
    with pytest.raises(UserError, match=said):
        trainer_of(tmp_path, dataset)


def test_rows_that_a_transform_makes_are_read_and_those_that_chance_makes_refused():
    def tokens(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [[len(text), 7] for text in batch["text"]], "label": [1] * len(batch["text"])}

    def by_chance(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": np.random.default_rng().integers(0, 2**31 - 1, (len(batch["text"]), 3)).tolist()}

    texts = Dataset.from_dict({"text": ["a", "bcd"]})
    documents, targets, labelled = documents_of(texts.with_transform(tokens), causal=False)
    assert (
        documents.input_ids.tolist() == [1, 7, 3, 7] and labelled and targets is not None and targets.tolist() == [1, 1]
    )
    with pytest.raises(UserError, match="dataset makes another row 1 each time"):
        documents_of(texts.with_transform(by_chance), causal=True)


class Drawn(torch.utils.data.Dataset):
    """Rows of one token and its class, drawn at each reading; where `repeats`, the first rows always are the same."""

    def __init__(self, draw: Any, repeats: bool = False) -> None:
        self.draw, self.repeats = draw, repeats

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, Any]:
        drawn = 1 if self.repeats and number < 4 else self.draw()
        return {"input_ids": torch.tensor([10 + drawn] * 2000), "labels": torch.tensor(drawn)}


def test_columns_of_a_row_that_chance_makes_are_of_the_same_draw():
    draw = np.random.default_rng(0)
    documents, targets, _ = documents_of(Drawn(lambda: int(draw.integers(0, 2)), repeats=True), causal=False)
    assert targets is not None and 0 < targets.sum() < 64
    np.testing.assert_array_equal(documents.input_ids[documents.starts[:-1]] - 10, targets)


class DrawnInTheMiddle(Drawn):
    """Only one token is drawn, which the text of a tensor leaves out."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = torch.full((2000,), 7)
        ids[1000] = self.draw()
        return {"input_ids": ids, "labels": 1}


def test_rows_that_chance_makes_are_refused_however_the_dataset_makes_them():
    draw = np.random.default_rng(0)
    tables = [kind(lambda: int(draw.integers(0, 2**20))) for kind in (Drawn, DrawnInTheMiddle)]
    by_chance = Dataset.from_dict({"text": ["a"] * 8}).with_transform(
        lambda batch: {"input_ids": [[int(draw.integers(5, 2**20))] * 3 for _ in batch["text"]]}
    )
    for table in (*tables, by_chance, torch.utils.data.Subset(by_chance, range(8))):
        with pytest.raises(UserError, match="dataset makes another row 1 each time"):
            documents_of(table, causal=True)
        with pytest.raises(UserError, match="or the dataset, makes other rows"):
            collated(table, default_data_collator)


def test_predictions_of_packed_rows_are_refused_and_their_loss_is_not(tmp_path):
    dataset = packed("seq_lengths")
    trainer = trainer_of(tmp_path, dataset)
    assert np.isfinite(trainer.evaluate(dataset)["eval_loss"])
    with pytest.raises(UserError, match="predictions are one a document"):
        trainer.predict(dataset)
