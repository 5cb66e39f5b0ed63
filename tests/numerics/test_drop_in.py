"""`from isotune import Trainer, SFTTrainer`: the library's constructor, losses that no split of a batch changes."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig

import isotune
from isotune.drop_in.refusals import uses_exact_gradients
from isotune.io.errors import RunFault, UserError
from isotune.models.base.builtin import builtin_tokenizer

VOCABULARY = 120
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPLITS = ((4, 2), (2, 4), (1, 8))
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
STEPS: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **SMALL, **options))


def bert(dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(0)
    dropped = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **SMALL, **dropped))


def conversations(rows: int = 24) -> Dataset:
    draw = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three"]
    make = lambda n: " ".join(draw.choice(words, n))  # noqa: E731
    columns = {"prompt": [make(draw.integers(2, 9)) for _ in range(rows)]}
    return Dataset.from_dict(columns | {"completion": [" " + make(draw.integers(1, 20)) for _ in range(rows)]})


def texts(rows: int = 24, seed: int = 0) -> Dataset:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(5, VOCABULARY, draw.integers(3, 30)).tolist() for _ in range(rows)]
    return Dataset.from_dict({"input_ids": ids, "label": draw.integers(0, 3, rows).tolist()})


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def sft(folder: Any, batch: int, accumulation: int, packing: bool = True, **more: Any) -> Any:
    arguments = {"output_dir": str(folder), "max_length": 64, "packing": packing, "bf16": False, **QUIET, **STEPS}
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = SFTConfig(**arguments, **split, **more.pop("args", {}))
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    return isotune.SFTTrainer(
        model=more.pop("model", None) or llama(attention_dropout=0.1),
        args=args,
        processing_class=tokenizer,
        **{"train_dataset": conversations(), **more},
    )


@pytest.mark.parametrize("packing", [True, False])
def test_no_split_of_an_updates_rows_changes_an_sft_loss_with_dropout_on(packing: bool, tmp_path):
    found = [losses_of(sft(tmp_path, *split, packing=packing)) for split in SPLITS[::2]]
    pinned = sft(tmp_path, 2, 1, packing=packing, global_batch_size=8, microbatch_tokens=256)
    found.append(losses_of(pinned))
    assert len(found[0]) == 3
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_the_first_sft_loss_is_that_of_a_loop_over_the_completions(tmp_path):
    model = llama()
    trainer = sft(tmp_path, 4, 2, model=model)
    documents, step = trainer.plan.documents.documents, trainer.plan.schedule.step(0)
    stock = llama().eval()
    total, count = 0.0, 0
    for number in [d for m in step.microbatches for d in m.documents]:
        span = slice(documents.starts[number], documents.starts[number + 1])
        ids = torch.from_numpy(documents.input_ids[span].astype(np.int64))
        logits = stock(input_ids=ids[None]).logits[0]
        chosen = np.flatnonzero(documents.supervised[span])
        total += float(cross_entropy(logits[chosen - 1], ids[chosen], reduction="sum").detach())
        count += len(chosen)
    prompts = [len(trainer.processing_class(text)["input_ids"]) for text in conversations()["prompt"]]
    assert documents.supervised_counts.tolist() == (documents.lengths - np.array(prompts)).tolist()
    assert losses_of(trainer)[0] == pytest.approx(total / count, rel=1e-6)


def test_lora_is_exact_by_itself_and_describe_says_so(tmp_path):
    trainer = sft(tmp_path, 4, 2, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    assert trainer.plan.exact_gradients
    said = isotune.describe(trainer)
    assert "8 rows" in said and "bit for bit" in said
    bits = [losses_of(trainer)]
    again = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    bits.append(losses_of(sft(tmp_path, 1, 8, peft_config=again)))
    assert bits[0] == bits[1]


def test_a_model_that_was_trained_exactly_is_trained_on_by_another_trainer_and_by_a_loop(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trained: Any = sft(tmp_path, 4, 2, peft_config=adapter)
    trained.train()
    assert trained.plan.exact_gradients
    fresh = sft(tmp_path, 4, 2, peft_config=adapter)
    fresh.model.load_state_dict(trained.model.state_dict())
    ids = torch.arange(5, 25)[None]
    gradients = []
    for model in (trained.model, fresh.model):  # the second was never trained by anything
        model.eval()(input_ids=ids).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert gradients[0] and all(one.equal(other) for one, other in zip(*gradients, strict=True))
    assert losses_of(sft(tmp_path, 4, 2, model=trained.model)) == losses_of(fresh)


class Thaws(TrainerCallback):
    """After the first update what was frozen is trained, and what was trained is frozen where it `swaps`."""

    def __init__(self, swaps: bool) -> None:
        self.swaps = swaps

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1:
            for parameter in model.parameters():
                parameter.requires_grad_(not (parameter.requires_grad and self.swaps))


@pytest.mark.parametrize("exact", ["auto", False])
@pytest.mark.parametrize("swaps", [False, True])
def test_layers_that_are_frozen_or_unfrozen_during_training_are_trained_as_by_the_library(swaps, exact, tmp_path):
    found = []
    for kind in (transformers.Trainer, isotune.Trainer):
        model = bert()
        model.bert.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        settings = {**STEPS, "max_steps": 4, "max_grad_norm": 0.05}
        trainer = kind(
            model=model,
            args=TrainingArguments(str(tmp_path), per_device_train_batch_size=8, **QUIET, **settings),
            train_dataset=texts(8),
            data_collator=DataCollatorWithPadding(builtin_tokenizer("builtin:bert-tiny")),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
            callbacks=[Thaws(swaps)],
            **({"exact_gradients": exact, "microbatch_tokens": 30} if kind is isotune.Trainer else {}),
        )
        losses = losses_of(trainer)
        found.append([losses, [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]])
        assert all(parameter.grad is None for parameter in model.parameters())
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def classifier(folder: Any, kind: Any, batch: int, accumulation: int, model: Any = None, **more: Any) -> Any:
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = TrainingArguments(output_dir=str(folder), seed=3, **QUIET, **STEPS, **split)
    tokenizer = builtin_tokenizer("builtin:bert-tiny")
    given = {
        "train_dataset": texts(),
        "eval_dataset": texts(21, seed=1),
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    return kind(model=model or bert(), args=args, **given, **more)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_a_classifiers_losses_do_not_depend_on_the_split_and_are_the_closed_form(tmp_path):
    found = [losses_of(classifier(tmp_path, isotune.Trainer, *split, model=bert(0.1))) for split in SPLITS[::2]]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    trainer = classifier(tmp_path, isotune.Trainer, 4, 2)
    numbers = [d for m in trainer.plan.schedule.step(0).microbatches for d in m.documents]
    rows, stock = texts(), bert().eval()
    logits = torch.cat([stock(input_ids=torch.tensor(rows[n]["input_ids"])[None]).logits for n in numbers])
    expected = cross_entropy(logits, torch.tensor([rows[n]["label"] for n in numbers]))
    assert losses_of(trainer)[0] == pytest.approx(float(expected.detach()), rel=1e-6)


def test_evaluation_and_predictions_are_those_of_the_stock_trainer_in_the_order_of_the_rows(tmp_path):
    ours = classifier(tmp_path, isotune.Trainer, 4, 2, compute_metrics=accuracy)
    stock = classifier(tmp_path, transformers.Trainer, 4, 2, compute_metrics=accuracy)
    mine, theirs = ours.predict(texts(21, seed=1)), stock.predict(texts(21, seed=1))
    np.testing.assert_allclose(mine.predictions, theirs.predictions, atol=1e-6)
    assert (mine.label_ids == theirs.label_ids).all()
    assert mine.metrics["test_accuracy"] == theirs.metrics["test_accuracy"]
    # stock averages the losses of batches of 8, 8 and 5 by their rows, which is right for equal weights
    logits = torch.tensor(theirs.predictions)
    expected = float(cross_entropy(logits, torch.tensor(theirs.label_ids).long()))
    assert mine.metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    seen: list[Any] = []
    ours.preprocess_logits_for_metrics = lambda logits, labels: seen.append(labels) or logits
    unlabelled = ours.predict(texts(21, seed=1).remove_columns("label"))
    np.testing.assert_array_equal(unlabelled.predictions, mine.predictions)
    assert seen == [None] * 21  # as stock
    assert unlabelled.label_ids is None and "test_loss" not in unlabelled.metrics


def test_an_evaluation_before_training_is_in_the_precision_of_training(tmp_path):
    args = TrainingArguments(str(tmp_path), bf16=True, **{**QUIET, **STEPS, "learning_rate": 0.0})
    trainer = isotune.Trainer(model=bert(), args=args, train_dataset=texts(), eval_dataset=texts(21, seed=1))
    before = trainer.predict(texts(21, seed=1))
    trainer.train()
    after = trainer.predict(texts(21, seed=1))
    np.testing.assert_array_equal(before.predictions, after.predictions)
    assert before.metrics["test_loss"] == after.metrics["test_loss"]


def test_a_run_that_is_resumed_from_the_librarys_checkpoint_goes_on_to_the_same_losses(tmp_path):
    def run(folder: Any, steps: int, **more: Any) -> Any:
        options = {**STEPS, "max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        args = TrainingArguments(output_dir=str(folder), **{**QUIET, **options}, per_device_train_batch_size=8)
        return isotune.Trainer(model=bert(0.1), args=args, train_dataset=texts(), **more)

    whole = losses_of(run(tmp_path / "whole", 4))
    run(tmp_path / "parts", 2).train()
    second = run(tmp_path / "parts", 4)
    second.train(resume_from_checkpoint=True)
    assert [line["loss"] for line in second.state.log_history if "loss" in line] == whole


@pytest.mark.parametrize(
    ("options", "args", "sentence"),
    [
        (
            {"model": BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SMALL))},
            {},
            "neither a causal language model nor a sequence classifier",
        ),
        ({"train_dataset": Dataset.from_dict({"input_ids": [[5] * 900], "label": [1]})}, {}, "row 1 .* 900 tokens"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, {}, "have no input_ids, but text"),
        ({}, {"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({}, {"auto_find_batch_size": True}, "microbatch_tokens"),
        ({}, {"include_for_metrics": ["loss"]}, "include_for_metrics: loss"),
        ({}, {"optim": "schedule_free_adamw"}, "needs a training loop"),
        ({}, {"bf16_full_eval": True}, "bf16_full_eval"),
        ({}, {"metric_for_best_model": "mean_token_accuracy"}, "metric_for_best_model"),
        ({"train_dataset": texts().remove_columns("label")}, {}, "none of the columns labels, label, label_ids"),
        (
            {"train_dataset": texts(2).add_column("inputs_embeds", [[1.0], [2.0]])},
            {},
            "BertForSequenceClassification.forward would be given the column 'inputs_embeds'",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_in_one_sentence(options: Any, args: Any, sentence: str, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET, **args)
    with pytest.raises(UserError, match=sentence):
        isotune.Trainer(**{"model": bert(), "args": arguments, "train_dataset": texts(), **options})


def under(precision: str = "no", optim: str = "adamw_torch", device: str = "cpu", **engine: Any) -> Any:
    """What a trainer knows of its engine, before its plan is made."""
    plugin = SimpleNamespace(deepspeed_config=engine["deepspeed"]) if "deepspeed" in engine else None
    return SimpleNamespace(
        args=SimpleNamespace(optim=optim, device=torch.device(device)),
        optimizer=engine.get("optimizer"),
        optimizer_cls_and_kwargs=None,
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=precision),
        is_deepspeed_enabled=plugin is not None,
        is_fsdp_enabled=engine.get("fsdp", False),
    )


def zero(stage: int, **config: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **config}}


@pytest.mark.parametrize(
    ("trainer", "sentence"),
    [
        (under(optim="adamw_torch_fused", fsdp=True), "under FSDP needs optim: adamw_torch or sgd"),
        (under(optim="adamw_torch_fused", **zero(1)), "under ZeRO-1 needs optim: adamw_torch or sgd"),
        (under(**zero(3, optimizer={"type": "AdamW"})), "because the optimizer of the DeepSpeed configuration rounds"),
        (
            under(fsdp=True, optimizer=torch.optim.Adagrad([torch.zeros(1)])),
            "under FSDP needs optim.* because your Adagrad",
        ),
        (under(**zero(0)), "cannot hold under ZeRO-0"),
        (under("bf16", **zero(2)), "cannot hold under ZeRO-2 in bf16"),
        (under("fp16", fsdp=True), "cannot hold under FSDP in fp16"),
        (under(device="mps"), "cannot hold on MPS"),
    ],
)
def test_exact_gradients_are_refused_where_an_engine_cannot_keep_them(trainer: Any, sentence: str):
    with pytest.raises(UserError, match=f"^exact_gradients: true .*{sentence}"):
        uses_exact_gradients(trainer, True, few_trained=True)
    assert not uses_exact_gradients(trainer, "auto", few_trained=True)


def test_exact_gradients_where_an_engine_keeps_them():
    own = torch.optim.AdamW([torch.zeros(1)])
    for trainer in (under(fsdp=True), under("bf16", **zero(3)), under(optim="adafactor", optimizer=own, **zero(1))):
        assert uses_exact_gradients(trainer, True, few_trained=False)
        assert not uses_exact_gradients(trainer, "auto", few_trained=True)
    assert uses_exact_gradients(under(optim="adafactor"), "auto", few_trained=True)


def test_a_trainer_under_fsdp_refuses_what_its_optimizer_rounds_by_place(tmp_path, monkeypatch):
    stock = transformers.Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        stock(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(UserError, match="exact_gradients: true under FSDP needs optim"):
        sft(tmp_path, 4, 2, exact_gradients=True)


def test_a_mixture_of_experts_keeps_its_coefficient_and_says_what_is_not_trained(tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.02}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **SMALL, **experts))
    found = [losses_of(sft(tmp_path, *split, model=copy.deepcopy(model))) for split in SPLITS[::2]]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    trainer = sft(tmp_path, 8, 1, model=model)
    assert "balancing loss (router_aux_loss_coef) is not trained" in capsys.readouterr().out
    assert trainer.model.config.router_aux_loss_coef == 0.02 and not trainer.model.config.output_router_logits
    with pytest.raises(UserError, match="router_aux_loss_coef"):
        sft(tmp_path, 8, 1, model=model, args={"router_aux_loss_coef": 0.01})


@pytest.mark.parametrize("asked", [True, False])
def test_the_librarys_trainer_balances_routers_where_their_logits_are_asked_for(asked: bool, tmp_path, capsys):
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "output_router_logits": asked}
    config = Qwen3MoeConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SMALL, **experts)
    args = TrainingArguments(str(tmp_path), **QUIET)
    isotune.Trainer(Qwen3MoeForCausalLM(config), args, train_dataset=texts().remove_columns("label"))
    assert ("balancing loss (router_aux_loss_coef) is not trained" in capsys.readouterr().out) == asked


class OwnSampler(isotune.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return None


class OwnLoader(isotune.Trainer):
    def get_eval_dataloader(self, *_: Any) -> Any:
        return None


class OwnPredictions(isotune.Trainer):
    def prediction_step(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("it is not called")


def test_a_sampler_of_ones_own_is_refused_and_a_sequential_one_honoured(tmp_path):
    with pytest.raises(UserError, match=r"OwnSampler._get_train_sampler decides what an update sees"):
        OwnSampler(model=bert(), args=TrainingArguments(str(tmp_path), **QUIET), train_dataset=texts())
    with pytest.raises(UserError, match=r"OwnLoader.get_eval_dataloader decides what an evaluation sees"):
        OwnLoader(model=bert(), args=TrainingArguments(str(tmp_path), **QUIET), train_dataset=texts())
    args = TrainingArguments(str(tmp_path), train_sampling_strategy="sequential", **QUIET)
    trainer = isotune.Trainer(model=bert(), args=args, train_dataset=texts())
    rows = sorted(d for m in trainer.plan.schedule.step(1).microbatches for d in m.documents)
    assert rows == list(range(8, 16))


def test_a_method_that_is_not_called_is_named_once_when_the_trainer_is_made(tmp_path, capsys):
    trainer = OwnPredictions(model=bert(), args=TrainingArguments(str(tmp_path), **QUIET), train_dataset=texts())
    assert len(trainer.predict(texts(3)).predictions) == 3
    said = capsys.readouterr().out
    assert said.count("not exact: prediction_step is your own, and is not called") == 1
    assert "not exact   prediction_step" in isotune.describe(trainer)
    assert "not exact" not in isotune.describe(isotune.Trainer(model=bert(), args=trainer.args, train_dataset=texts()))


class OwnStep(isotune.Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("causal", [False, True])
def test_a_training_step_of_ones_own_is_told_that_an_item_is_an_update(causal: bool, tmp_path):
    model, rows = (llama(), texts().remove_columns("label")) if causal else (bert(), texts())
    args = TrainingArguments(str(tmp_path), **QUIET, **STEPS)
    trainer = OwnStep(model, args, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(UserError, match="calls compute_loss, but an item is a whole update"):
        trainer.train()
    with pytest.raises(UserError, match="the loader of an evaluation has no batches"):
        list(trainer.get_eval_dataloader())


def test_sft_says_what_differs_from_trl_without_preparation_and_in_its_logs(tmp_path, capsys):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 16, "labels": [[5, 6, 7, 8]] * 16})
    skips = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    sft(tmp_path, 2, 1, train_dataset=rows, args=skips)
    said = capsys.readouterr().out
    assert "packing: TRL packs nothing where the preparation is skipped; 16 rows became 1" in said
    assert "mean_token_accuracy, entropy and num_tokens, which TRL's own step computes, are not logged" in said
    sft(tmp_path, 2, 1, packing=False, train_dataset=rows, args=skips)
    assert "TRL packs nothing" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no input_ids, but prompt, completion: take skip_prepare_dataset out"):
        sft(tmp_path, 2, 1, args=skips)


def test_what_sft_cannot_train_exactly_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="packing_strategy: bfd_split: rows would be cut off at max_length"):
        sft(tmp_path, 4, 2, args={"packing_strategy": "bfd_split"})
    for adapter in (PromptTuningConfig(num_virtual_tokens=4), PrefixTuningConfig(num_virtual_tokens=4)):
        with pytest.raises(UserError, match=f"{type(adapter).__name__}: virtual tokens"):
            sft(tmp_path, 4, 2, peft_config=adapter)
    args = SFTConfig(
        str(tmp_path), max_length=8, packing=True, bf16=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    rows = Dataset.from_dict({"input_ids": [[5] * 8, [5] * 9]})
    with pytest.raises(UserError, match="row 2 of the dataset has 9 tokens, and max_length is 8"):
        isotune.SFTTrainer(llama(), args, train_dataset=rows, processing_class=builtin_tokenizer("builtin:opt-tiny"))


def test_a_trainer_without_a_dataset_predicts_and_does_not_train(tmp_path):
    args = TrainingArguments(str(tmp_path), **QUIET)
    trainer = isotune.Trainer(bert(), args)
    expected = isotune.Trainer(bert(), args, train_dataset=texts()).predict(texts(5, seed=1))
    found = trainer.predict(texts(5, seed=1))
    np.testing.assert_array_equal(found.predictions, expected.predictions)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-6)
    with pytest.raises(UserError, match="there is no train_dataset"):
        trainer.train()


def test_the_checkpoint_of_a_run_is_refused_in_one_sentence(tmp_path):
    trainer = isotune.Trainer(bert(), TrainingArguments(str(tmp_path), **QUIET), train_dataset=texts())
    with pytest.raises(UserError, match="step-00000008 is a checkpoint of a run of isotune"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-00000008"))


def test_no_arguments_are_the_librarys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = isotune.Trainer(bert(), train_dataset=texts())
    assert trainer.args.output_dir == "tmp_trainer" and trainer.plan.schedule.global_batch_size == 8
    assert not trainer.args.average_tokens_across_devices  # a schedule knows the global batch


def test_the_labels_that_a_collator_would_change_are_named(tmp_path, capsys):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = texts().remove_columns("label")
    for data, said in (
        (rows, f"every {tokenizer.eos_token} is learnt"),
        (rows.add_column("labels", rows["input_ids"]), "labels of the dataset are learnt"),
    ):
        args = TrainingArguments(str(tmp_path), **QUIET)
        isotune.Trainer(llama(), args, train_dataset=data, data_collator=collator)
        assert said in capsys.readouterr().out


def test_true_and_false_are_classes_and_another_column_of_labels_is_honoured(tmp_path):
    rows = texts()
    data = rows.remove_columns("label").add_column("good", [bool(n % 2) for n in range(24)])
    args = TrainingArguments(str(tmp_path), label_names=["good"], **QUIET)
    trainer = isotune.Trainer(model=bert(), args=args, train_dataset=data)
    assert trainer.plan.documents.documents.labels.tolist() == [n % 2 for n in range(24)]


def test_a_loss_that_is_no_number_stops_and_names_the_rows_and_no_recipes_key(tmp_path):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **{**QUIET, **STEPS})
    trainer = isotune.Trainer(model=bert(), args=args, train_dataset=texts())
    with torch.no_grad():
        trainer.model.classifier.bias[0] = float("nan")
    tests = [own for own in trainer.callback_handler.callbacks if "SelfTest" in type(own).__name__]
    trainer.remove_callback(tests[0])
    with pytest.raises(RunFault, match=r"the loss of step 1, microbatch 0, documents of row [\d, ]+ is not finite$"):
        trainer.train()


def test_a_formatting_function_makes_the_texts_that_are_learnt(tmp_path):
    rows = Dataset.from_dict({"q": ["one", "two"], "a": ["red", "green blue"]})
    trainer = sft(tmp_path, 2, 1, train_dataset=rows, formatting_func=lambda row: f"{row['q']} is {row['a']}")
    documents, tokenizer = trainer.plan.documents.documents, trainer.processing_class
    found = [tokenizer.decode(ids) for ids in np.split(documents.input_ids, documents.starts[1:-1])]
    assert [text.replace(tokenizer.eos_token, "") for text in found] == ["one is red", "two is green blue"]


class Counted(TrainerCallback):
    steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def test_the_best_model_by_one_of_several_evaluation_sets_is_loaded_and_callbacks_are_called(tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_second_loss"}
    args = TrainingArguments(str(tmp_path), **{**QUIET, **STEPS, **every, **best})
    sets, counted = {"first": texts(6, seed=1), "second": texts(7, seed=2)}, Counted()
    trainer = isotune.Trainer(bert(), args, train_dataset=texts(), eval_dataset=sets, callbacks=[counted])
    trainer.train()
    names = ("eval_first_loss", "eval_second_loss")
    seen = {name: [line[name] for line in trainer.state.log_history if name in line] for name in names}
    assert counted.steps == 3 and [len(losses) for losses in seen.values()] == [3, 3]
    assert trainer.state.best_metric == min(seen["eval_second_loss"]) != seen["eval_second_loss"][-1]
    assert trainer.evaluate(sets["second"])["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_an_optimizer_of_ones_own_makes_the_updates(given: str, tmp_path):
    model = bert()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    own: Any = (torch.optim.SGD([model.classifier.bias], lr=0.1), None)
    if given == "optimizer_cls_and_kwargs":
        own = (torch.optim.SGD, {"lr": 0.0})
    args = TrainingArguments(str(tmp_path), **{**QUIET, **STEPS, "max_steps": 1})
    isotune.Trainer(model, args, train_dataset=texts(), **{given: own}).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == ({"classifier.bias"} if given == "optimizers" else set())
