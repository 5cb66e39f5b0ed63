"""Losses of a user's own under `isotune.Trainer`: over the global batch, whatever the split of it."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from tests.numerics.test_drop_in import (
    QUIET,
    SMALL,
    SPLITS,
    STEPS,
    VOCABULARY,
    conversations,
    llama,
    losses_of,
    sft,
    texts,
)
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

import isotune
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

WEIGHTS = torch.tensor([1.0, 5.0, 0.2])


def bert(outputs: int = 3, dropout: float = 0.0, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    dropped = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_labels=outputs, **SMALL, **dropped, **options)
    )


def trainer_of(kind: Any, folder: Any, split: tuple[int, int], model: Any, data: Any, **more: Any) -> Any:
    batch, accumulation = split
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=64,
        **{"seed": 3, **QUIET, **STEPS, **more.pop("args", {})},
    )
    collator = more.pop("data_collator", None) or DataCollatorWithPadding(builtin_tokenizer("builtin:bert-tiny"))
    return kind(model=model, args=args, train_dataset=data, data_collator=collator, **more)


def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return functional.cross_entropy(outputs.logits, labels, WEIGHTS)


def contrastive(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    states = functional.normalize(outputs.logits, dim=-1)
    near = (labels[:, None] == labels[None]).float()
    return functional.binary_cross_entropy_with_logits(states @ states.T, near)


class Weighted(isotune.Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs, labels)
        return (loss, outputs) if return_outputs else loss


class StockWeighted(Trainer):
    compute_loss = Weighted.compute_loss  # type: ignore[assignment]  (of another class)


def numbers_of(make: Any) -> Dataset:
    """Texts whose target is a function of a random generator."""
    draw = np.random.default_rng(5)
    return texts().remove_columns("label").add_column("labels", [make(draw) for _ in range(24)])


REGRESSION = numbers_of(lambda draw: float(draw.normal()))
SEVERAL = numbers_of(lambda draw: draw.integers(0, 2, 3).astype(float).tolist())


def pairs(rows: int = 24) -> Dataset:
    """Pairs of texts, of which the second has tokens of type 1."""
    data = texts(rows)
    types = [[int(place >= len(ids) // 2) for place in range(len(ids))] for ids in data["input_ids"]]
    return data.add_column("token_type_ids", types)


KINDS: dict[str, Any] = {
    "class weights in compute_loss": (Weighted, StockWeighted, bert, texts(), {}),
    "class weights in compute_loss_func": (isotune.Trainer, Trainer, bert, texts(), {"compute_loss_func": weighted}),
    "a contrastive loss": (isotune.Trainer, Trainer, bert, texts(), {"compute_loss_func": contrastive}),
    "regression": (isotune.Trainer, Trainer, partial(bert, 1), REGRESSION, {}),
    "several labels": (isotune.Trainer, Trainer, bert, SEVERAL, {}),
}


IN_SHORT = ("class weights in compute_loss", "a contrastive loss", "regression")


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_a_loss_of_logits_is_that_of_one_whole_batch_on_any_split(name: str, tmp_path):
    ours, stock, make, data, options = KINDS[name]
    whole = trainer_of(ours, tmp_path, (8, 1), make(), data, eval_dataset=data, **options)
    found = losses_of(whole)
    assert whole.own_loss is not None and "second forward" in isotune.describe(whole)
    for split in SPLITS[::2]:
        assert losses_of(trainer_of(ours, tmp_path, split, make(), data, **options)) == pytest.approx(found, rel=1e-6)
    if options:  # one of each kind
        dropped = [losses_of(trainer_of(ours, tmp_path, s, make(dropout=0.1), data, **options)) for s in SPLITS[:2]]
        assert dropped[1] == pytest.approx(dropped[0], rel=1e-6) and dropped[0] != pytest.approx(found, rel=1e-3)
    # the library, given the same rows in one batch in the same order
    order = [d for step in range(3) for m in whole.plan.schedule.step(step).microbatches for d in m.documents]
    theirs = trainer_of(
        stock, tmp_path, (8, 1), make(), data.select(order), args={"train_sampling_strategy": "sequential"}, **options
    )
    assert found == pytest.approx(losses_of(theirs), rel=1e-5)
    at_end = trainer_of(stock, tmp_path, (24, 1), whole.model, data, eval_dataset=data, **options)
    with torch.no_grad():
        batch = dict(at_end.data_collator([data[n] for n in range(24)]))
        expected = float(at_end.compute_loss(whole.model.eval(), batch))
    assert whole.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_types_of_a_pairs_tokens_reach_the_model(tmp_path):
    found = [losses_of(trainer_of(isotune.Trainer, tmp_path, split, bert(), pairs())) for split in SPLITS[::2]]
    whole = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), pairs())
    order = [d for step in range(3) for m in whole.plan.schedule.step(step).microbatches for d in m.documents]
    options = {"args": {"train_sampling_strategy": "sequential"}}
    theirs = losses_of(trainer_of(Trainer, tmp_path, (8, 1), bert(), pairs().select(order), **options))
    assert found[0] == pytest.approx(theirs, rel=1e-5) and found[1] == pytest.approx(theirs, rel=1e-5)
    assert found[0] != pytest.approx(
        losses_of(trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), texts())), rel=1e-4
    )


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.filterwarnings("ignore:.*compute_loss_func.*")
def test_a_token_loss_that_adds_up_needs_no_second_forward_and_is_the_plain_one(tmp_path):
    plain = losses_of(sft(tmp_path, 4, 2, packing=False))
    for split in SPLITS[::2]:
        trainer = sft(tmp_path, *split, packing=False, compute_loss_func=summed)
        assert trainer.own_loss.adds_up and "a sum over rows" in isotune.describe(trainer)
        assert losses_of(trainer) == pytest.approx(plain, rel=1e-6)


def test_label_smoothing_over_tokens_is_that_of_one_whole_batch(tmp_path):
    rows = sft(tmp_path, 8, 1, packing=False).train_dataset
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    options = {"data_collator": collator, "args": {"label_smoothing_factor": 0.2}}
    found = [losses_of(trainer_of(isotune.Trainer, tmp_path, split, llama(), rows, **options)) for split in SPLITS[::2]]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    whole = trainer_of(isotune.Trainer, tmp_path, (8, 1), llama(), rows, **options)
    order = [d for step in range(3) for m in whole.plan.schedule.step(step).microbatches for d in m.documents]
    options["args"]["train_sampling_strategy"] = "sequential"
    theirs = trainer_of(Trainer, tmp_path, (8, 1), llama(), rows.select(order), **options)
    assert found[0] == pytest.approx(losses_of(theirs), rel=1e-5)


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dft_and_neftune_do_not_depend_on_the_split(packing: bool, tmp_path):
    plain = losses_of(sft(tmp_path, 8, 1, packing=packing))
    for args in ({"loss_type": "dft"}, {"neftune_noise_alpha": 5.0}):
        found = [losses_of(sft(tmp_path, *split, packing=packing, args=args)) for split in SPLITS[::2]]
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-6)
        assert found[0] != pytest.approx(plain, rel=1e-3)


def masks_every_label_but_the_last(rows: Any) -> Any:
    batch = transformers.DataCollatorForSeq2Seq(builtin_tokenizer("builtin:opt-tiny"))(rows)
    last = batch["attention_mask"].sum(dim=1) - 1
    labels = torch.full_like(batch["input_ids"], -100)
    labels[torch.arange(len(last)), last] = batch["input_ids"][torch.arange(len(last)), last]
    return {**batch, "labels": labels}


def drops_tokens(rows: Any) -> Any:
    ids = [row["input_ids"][: int(torch.randint(2, 5, ()))] for row in rows]
    return DataCollatorWithPadding(builtin_tokenizer("builtin:bert-tiny"))([{"input_ids": own} for own in ids])


def test_a_collator_that_masks_labels_row_by_row_is_honoured_and_one_by_chance_refused(tmp_path):
    rows = sft(tmp_path, 8, 1, packing=False).train_dataset
    found = []
    for split in SPLITS[::2]:
        trainer = trainer_of(
            isotune.Trainer, tmp_path, split, llama(), rows, data_collator=masks_every_label_but_the_last
        )
        assert trainer.plan.documents.documents.supervised_counts.tolist() == [1] * len(rows)
        found.append(losses_of(trainer))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    with pytest.raises(UserError, match="data_collator, or the dataset, makes other rows of the same ones"):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), texts(), data_collator=drops_tokens)


@pytest.mark.parametrize(
    ("column", "collator"),
    [
        ("label_ids", default_data_collator),
        ("label_ids", DataCollatorWithPadding(builtin_tokenizer("builtin:opt-tiny"))),
        ("label", DataCollatorForSeq2Seq(builtin_tokenizer("builtin:opt-tiny"))),
    ],
)
def test_tokens_that_any_column_of_labels_masks_are_not_learnt(column: str, collator: Any, tmp_path):
    ids = np.random.default_rng(0).integers(5, 50, (8, 12)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, column: [[-100] * 8 + row[8:] for row in ids]})
    logs = []
    for kind in (isotune.Trainer, Trainer):
        args = {"max_steps": 1}
        trainer = trainer_of(kind, tmp_path, (8, 1), llama(), rows, args=args, data_collator=collator)
        trainer.train()
        logs.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_a_list_in_a_column_that_the_collator_does_not_read_is_no_label(tmp_path):
    ids = np.random.default_rng(0).integers(5, 50, (8, 12)).tolist()
    collator = DataCollatorForLanguageModeling(builtin_tokenizer("builtin:opt-tiny"), mlm=False)
    rows = Dataset.from_dict({"input_ids": ids, "label": [[0, 1, 0]] * 8})
    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), llama(), rows, data_collator=collator)
    assert trainer.plan.documents.documents.supervised_counts.tolist() == [11] * 8


CLASSES = texts().remove_columns("label")


@pytest.mark.parametrize(
    ("column", "options", "said"),
    [
        ([0, 3] + [1] * 22, {}, "row 2 of the dataset has the class 3 in 'label', and the model has 3"),
        ([[0], [3]] + [[1]] * 22, {}, "row 2 of the dataset has the class 3"),
        (
            [[1, 0, 1]] * 24,
            {},
            r"row 1 of the dataset has \[1, 0, 1\] in 'label': labels of several classes are floats",
        ),
        ([[1.0, 0.0]] * 24, {}, "one for each of the 3"),
        ([1] * 24, {"problem_type": "multi_label_classification"}, "labels of several classes are floats"),
        ([1.0] * 24, {}, "row 1 of the dataset has 1.0 in 'label': a class is a whole number"),
        ([[1.0, 0.0, 1.0]] * 24, {"problem_type": "single_label_classification"}, "a class is a whole number"),
    ],
)
def test_labels_that_the_model_has_no_class_for_are_refused_by_their_row(
    column: Any, options: Any, said: str, tmp_path
):
    rows = CLASSES.add_column("label", column)
    with pytest.raises(UserError, match=said):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(**options), rows)
    with pytest.raises(UserError, match=said):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(**options), None).evaluate(rows)


def test_labels_of_a_loss_of_ones_own_may_be_any(tmp_path):
    rows = CLASSES.add_column("label", list(range(24)))
    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), rows, compute_loss_func=contrastive)
    assert trainer.plan.documents.targets.tolist() == list(range(24))


@pytest.mark.parametrize("make", [bert, llama])
def test_tokens_without_an_embedding_are_refused_by_their_row(make: Any, tmp_path):
    model = make()
    size = model.get_input_embeddings().num_embeddings
    rows = texts(3).remove_columns("input_ids").add_column("input_ids", [[5, size - 1], [6, 7, size], [8]])
    with pytest.raises(UserError, match=f"row 2 of the dataset has the token {size}, and the model has embeddings of"):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), model, rows)


class Streamed(torch.utils.data.IterableDataset):
    """A stream that says how long it is."""

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Any:
        return iter([{"input_ids": [5, 6], "labels": 1}] * 16)


@pytest.mark.parametrize("collator", [None, drops_tokens])
def test_a_stream_with_a_length_is_refused_as_one(collator: Any, tmp_path):
    with pytest.raises(UserError, match="a streaming dataset has no lengths"):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), Streamed(), data_collator=collator)


def padded_rows() -> dict[str, Any]:
    """Tokens and mask of rows of 4 to 11 tokens, padded to 12 by the token 0 of a tokenizer whose </s> is another."""
    ids = np.random.default_rng(0).integers(5, 50, (8, 12))
    mask = np.arange(12) < np.arange(4, 12)[:, None]
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids[~mask] = tokenizer.pad_token_id
    return {"input_ids": ids.tolist(), "attention_mask": mask.astype(int).tolist()}


def test_padding_without_a_mask_is_not_learnt_where_the_collator_masks_it(tmp_path):
    rows = Dataset.from_dict(padded_rows()).remove_columns("attention_mask")
    collator = DataCollatorForLanguageModeling(builtin_tokenizer("builtin:opt-tiny"), mlm=False)
    logs = []
    for kind in (isotune.Trainer, Trainer):
        args = {"max_steps": 1}
        trainer = trainer_of(kind, tmp_path, (8, 1), llama(), rows, args=args, data_collator=collator)
        before = trainer.evaluate(rows)["eval_loss"]
        trainer.train()
        line = next(line for line in trainer.state.log_history if "loss" in line)
        logs.append([before, line["loss"], line["grad_norm"]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def copies_padding(rows: Any) -> Any:
    batch = DataCollatorWithPadding(builtin_tokenizer("builtin:opt-tiny"))(
        [{"input_ids": r["input_ids"]} for r in rows]
    )
    return {**batch, "labels": batch["input_ids"].clone()}


def test_labels_of_padding_that_are_left_out_are_said(tmp_path, capsys):
    rows = padded_rows()
    count = sum(row.count(0) for row in rows["attention_mask"])
    for data, collator, said in (
        (Dataset.from_dict({**rows, "labels": rows["input_ids"]}), default_data_collator, f"{count} labels of padding"),
        (texts(8).remove_columns("label"), copies_padding, "note        labels of padding"),
    ):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), llama(), data, data_collator=collator)
        assert f"{said} are left out, which the library would count" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["labels", "label_ids"])
def test_of_two_columns_of_labels_the_named_one_is_learnt_and_none_without_a_name(other: str, tmp_path):
    rows = texts().add_column(other, [0] * 24)
    with pytest.raises(UserError, match="the dataset has labels in "):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), rows)
    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), rows, args={"label_names": [other]})
    assert not trainer.plan.documents.documents.labels.any()


@pytest.mark.parametrize("first", [None, texts(5)])
def test_the_loss_of_labels_of_another_kind_than_was_planned_is_that_of_the_library(first: Any, tmp_path):
    found = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), None, eval_dataset=first).evaluate(SEVERAL)
    stock = trainer_of(Trainer, tmp_path, (8, 1), bert(), None).evaluate(SEVERAL)
    assert found["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-5) and "eval_accuracy" not in found


@pytest.mark.parametrize(("data", "there"), [(SEVERAL, r"\[\d\.0, \d\.0, \d\.0\]"), (REGRESSION, r"-?\d\.\d+")])
def test_labels_of_another_kind_than_is_trained_are_not_evaluated(data: Dataset, there: str, tmp_path):
    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), texts())
    with pytest.raises(UserError, match=rf"row 1 of the dataset has {there} in 'labels'"):
        trainer.evaluate(data)
    assert "test_loss" not in trainer.predict(data.remove_columns("labels")).metrics


def test_a_model_of_model_init_is_made_anew_for_each_training(tmp_path):
    options = {"model_init": lambda: bert(3, 0.1)}
    once = trainer_of(isotune.Trainer, tmp_path, (8, 1), None, texts(), **options)
    first = losses_of(once)
    once.train()
    again = [line["loss"] for line in once.state.log_history if "loss" in line]
    assert first == again == losses_of(trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(3, 0.1), texts()))


def test_a_search_trains_each_trial_with_its_own_arguments(tmp_path):
    trainer = trainer_of(
        isotune.Trainer, tmp_path, (2, 2), None, texts(), model_init=lambda: bert(), eval_dataset=texts(6)
    )
    trials = [(4, 1, 7), (2, 3, 8), (8, 2, 9)]
    seen: list[tuple[int, int, list[float]]] = []

    class Notes(transformers.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert args.gradient_accumulation_steps == 1  # the loop's: an item is a whole update
            schedule, losses = trainer.plan.schedule, [line["loss"] for line in state.log_history if "loss" in line]
            seen.append((schedule.global_batch_size, trainer.update.seed, losses))

    def space(trial: Any) -> dict[str, Any]:
        batch, accumulation, seed = trials[trial.number]
        trial.suggest_float("learning_rate", 1e-2, 1e-2)
        return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "seed": seed}

    trainer.add_callback(Notes())
    found = trainer.hyperparameter_search(space, n_trials=3, backend="optuna")
    assert found.run_id in ("0", "1", "2")
    assert [(batch, seed) for batch, seed, _ in seen] == [(4, 7), (6, 8), (16, 9)]
    for (batch, accumulation, seed), (_, _, losses) in zip(trials, seen, strict=True):
        options = {"args": {"seed": seed}}
        assert losses_of(
            trainer_of(isotune.Trainer, tmp_path, (batch, accumulation), bert(), texts(), **options)
        ) == pytest.approx(losses, rel=1e-6)


def test_another_train_dataset_before_training_is_trained_on(tmp_path):
    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), texts())
    trainer.train_dataset = texts(16, seed=4)
    found = losses_of(trainer)
    assert len(trainer.plan.documents.documents) == 16
    assert found == losses_of(trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), texts(16, seed=4)))


def four_accumulated(trainer: Any, args: Any) -> None:
    trainer.args.gradient_accumulation_steps = 4


def four_accumulated_by_the_script(trainer: Any, args: Any) -> None:
    args.gradient_accumulation_steps = 4


def five_steps_of_the_script(trainer: Any, args: Any) -> None:
    args.max_steps, args.learning_rate = 5, 3e-2


def loss_given_late(trainer: Any, args: Any) -> None:
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 7 * weighted(outputs, labels)


def smoothing_given_late(trainer: Any, args: Any) -> None:
    trainer.args.label_smoothing_factor = 0.3


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (four_accumulated, {"gradient_accumulation_steps": 4}),
        (four_accumulated_by_the_script, {"gradient_accumulation_steps": 4}),
        (five_steps_of_the_script, {"max_steps": 5, "learning_rate": 3e-2}),
        (loss_given_late, {}),
        (smoothing_given_late, {"label_smoothing_factor": 0.3}),
    ],
)
def test_what_a_script_changes_before_training_is_trained_with(change: Any, given: dict[str, Any], tmp_path):
    settings: dict[str, Any] = {**QUIET, **STEPS, "max_steps": 2, "per_device_train_batch_size": 2}
    args = TrainingArguments(str(tmp_path), **settings)
    rows: dict[str, Any] = {"train_dataset": texts(16)}
    rows["data_collator"] = DataCollatorWithPadding(builtin_tokenizer("builtin:bert-tiny"))
    trainer = isotune.Trainer(bert(), args, **rows)
    change(trainer, args)
    expected: Any = isotune.Trainer(bert(), TrainingArguments(str(tmp_path), **settings | given), **rows)
    if change is loss_given_late:
        with pytest.raises(UserError, match="compute_loss_func was changed"):
            trainer.evaluate(texts(4))
        loss: Any = trainer.compute_loss_func
        expected = isotune.Trainer(bert(), args, compute_loss_func=loss, **rows)
    assert losses_of(trainer) == losses_of(expected)
    assert trainer.state.epoch == expected.state.epoch == trainer.state.global_step * trainer.global_batch_size / 16


def test_an_argument_that_is_refused_is_refused_when_it_is_set_later(tmp_path):
    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), texts())
    trainer.args.dataloader_drop_last = True
    with pytest.raises(UserError, match="dataloader_drop_last"):
        trainer.train()


class Logs(Weighted):
    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        self.log({"own": 1.0})
        return super().compute_loss(*arguments, **options)


def test_a_loss_that_logs_logs_nothing_when_the_trainer_is_made(tmp_path):
    trainer = trainer_of(Logs, tmp_path, (8, 1), bert(), texts(), args={"max_steps": 2})
    assert not trainer.state.log_history
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "own" in line] == [0, 1]


def mean_of_tokens(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def test_trls_metrics_beside_a_loss_of_ones_own_are_those_of_trl(tmp_path):
    kept = ("num_tokens", "mean_token_accuracy", "entropy")
    found = []
    for kind in (SFTTrainer, isotune.SFTTrainer):
        settings: dict[str, Any] = {**QUIET, **STEPS, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        args = SFTConfig(str(tmp_path), max_length=64, bf16=False, per_device_train_batch_size=8, **settings)
        rows: dict[str, Any] = {"train_dataset": conversations(8), "eval_dataset": conversations(8)}
        tokenizer = builtin_tokenizer("builtin:opt-tiny")
        trainer = kind(llama(), args, processing_class=tokenizer, compute_loss_func=mean_of_tokens, **rows)
        trainer.train()
        lines = [
            {name: value for name, value in line.items() if name.removeprefix("eval_") in kept}
            for line in trainer.state.log_history
        ]
        found.append([line for line in lines if line])
    assert len(found[0]) == len(found[1]) == 4
    for stock, own in zip(*found, strict=True):
        assert own == pytest.approx(stock, rel=1e-5)


def test_a_second_trainer_of_the_same_model_goes_on_with_its_own_loss(tmp_path):
    model = bert()
    losses_of(trainer_of(isotune.Trainer, tmp_path, (8, 1), model, texts(), args={"label_smoothing_factor": 0.3}))
    second = trainer_of(isotune.Trainer, tmp_path, (8, 1), model, texts())
    step = second.plan.schedule.step(0)
    numbers = [d for m in step.microbatches for d in m.documents]
    with torch.no_grad():
        model.eval()
        logits = torch.cat([model(torch.tensor(texts()[n]["input_ids"])[None]).logits for n in numbers])
    expected = functional.cross_entropy(logits, torch.tensor([texts()[n]["label"] for n in numbers]))
    assert losses_of(second)[0] == pytest.approx(float(expected), rel=1e-6)


def test_a_row_without_a_supervised_token_is_predicted_in_its_place(tmp_path):
    rows = texts().remove_columns("label")
    masked = [[-100] * len(ids) if n == 2 else ids for n, ids in enumerate(rows["input_ids"])]
    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), llama(), rows.add_column("labels", masked))
    assert len(trainer.plan.documents.documents) == 23
    found = trainer.predict(rows.add_column("labels", masked))
    model = trainer.model.eval()
    with torch.no_grad():
        for row in (1, 2, 3):
            expected = model(torch.tensor(rows[row]["input_ids"])[None]).logits[0].numpy()
            np.testing.assert_allclose(found.predictions[row, : len(expected)], expected, atol=1e-5)


def focal(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """The mean over next tokens of (1 - p)^2 times the cross-entropy."""
    scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    each = functional.cross_entropy(scores, targets, reduction="none", ignore_index=-100)
    return ((1 - torch.exp(-each)).square() * each).sum() / (targets != -100).sum()


class HalvedForSequenceClassification(BertForSequenceClassification):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        outputs = super().forward(*arguments, **options)
        outputs.loss = None if outputs.loss is None else outputs.loss / 2
        return outputs


def test_a_loss_function_of_the_model_is_trained_on_any_split(tmp_path):
    rows = sft(tmp_path, 8, 1, packing=False).train_dataset.select_columns(["input_ids", "labels"])

    def trainer(split: tuple[int, int]) -> Any:
        model = llama()
        model.loss_function = focal
        collator = transformers.DataCollatorForSeq2Seq(builtin_tokenizer("builtin:opt-tiny"))
        return trainer_of(isotune.Trainer, tmp_path, split, model, rows, data_collator=collator)

    whole = trainer((8, 1))
    found = losses_of(whole)
    assert losses_of(trainer((2, 4))) == pytest.approx(found, rel=1e-6)
    batch = whole.data_collator([rows[d] for m in whole.plan.schedule.step(0).microbatches for d in m.documents])
    with torch.no_grad():
        logits = llama().eval()(batch["input_ids"], batch["attention_mask"]).logits
    assert found[0] == pytest.approx(float(focal(logits, batch["labels"])), rel=1e-5)


def test_a_loss_of_the_models_forward_alone_is_refused_before_the_first_step(tmp_path):
    torch.manual_seed(0)
    model = HalvedForSequenceClassification(bert().config)
    said = r"HalvedForSequenceClassification\.forward returns a loss .* give it as compute_loss_func"
    with pytest.raises(UserError, match=said):
        trainer_of(isotune.Trainer, tmp_path, (8, 1), model, texts()).train()
    by_logits = trainer_of(isotune.Trainer, tmp_path, (8, 1), model, texts(), compute_loss_func=weighted)
    assert len(losses_of(by_logits)) == 3  # no loss of the model's is asked for


class CallsTwice(isotune.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return (model(**inputs).logits - model(**inputs).logits).square().mean()


class LooksInside(isotune.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return model(**inputs, output_hidden_states=True).hidden_states[-1].mean()


class NoLogits(isotune.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return torch.zeros(())


class AnotherModel(isotune.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return self.model(**inputs).loss


class Penalty(isotune.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return model(**inputs).loss + 0.01 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (CallsTwice, "calls the model twice"),
        (LooksInside, "from the logits alone"),
        (NoLogits, "no use of the logits"),
        (AnotherModel, "no use of the logits"),
        (Penalty, r"reads weights of the model beside its logits \(bert\.embeddings\.word_embeddings\.weight\)"),
    ],
)
def test_a_loss_of_something_else_is_refused_before_training(kind: Any, sentence: str, tmp_path):
    with pytest.raises(UserError, match=sentence):
        trainer_of(kind, tmp_path, (8, 1), bert(), texts())


def test_a_loss_of_nothing_on_the_first_rows_is_not_taken_for_a_sum(tmp_path):
    def beyond(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """A mean over the rows whose logits are large, which random ones are not."""
        return functional.relu(outputs.logits - 100).mean()

    trainer = trainer_of(isotune.Trainer, tmp_path, (8, 1), bert(), texts(), compute_loss_func=beyond)
    assert not trainer.own_loss.adds_up
