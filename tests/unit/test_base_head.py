"""A base that is a classifier already: its head goes on where it tells the same classes apart, and is new elsewhere."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
)
from transformers import DistilBertForSequenceClassification as DistilBert
from transformers import RobertaForSequenceClassification as Roberta

from isotune.config import ClassificationRecipe, Recipe
from isotune.models.base.head import BaseHead, names_of, set_names
from isotune.models.opening import load_base_model, load_config

SINGLE = "single_label_classification"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 50}
KINDS = {
    "bert": (BertForSequenceClassification, BertConfig, SMALL),
    "roberta": (Roberta, RobertaConfig, SMALL),
    "distilbert": (DistilBert, DistilBertConfig, DISTIL),
}


@pytest.fixture
def base(tmp_path):
    """Save a classifier of these classes; returns its recipe and model."""

    def made(kind: str = "bert", names=None, **more):
        model_class, config_class, sizes = KINDS[kind]
        labels = {"id2label": dict(enumerate(names)), "label2id": {n: k for k, n in enumerate(names)}} if names else {}
        torch.manual_seed(3)
        model = model_class(config_class(**sizes, **labels, **more)).eval()
        model.save_pretrained(tmp_path / "base")
        keys = {"dataset_name": "x", "output_dir": str(tmp_path / "run"), "max_seq_length": 16, "tune": "full"}
        return ClassificationRecipe.from_values(**keys, model_name_or_path=str(tmp_path / "base")), model

    return made


def opened(recipe, names, classes, problem_type=SINGLE):
    config = load_config(recipe)
    head = BaseHead.of(config, classes, names, problem_type)
    set_names(config, classes, names, problem_type)
    return head, load_base_model(recipe, config, torch.device("cpu"), head).eval()


def body_and_logits(model):
    ids = torch.arange(5, 15).view(2, 5)
    with torch.no_grad():
        return model.base_model(ids).last_hidden_state, model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_goes_on_with_its_classes_in_the_order_of_the_data(base, kind):
    recipe, model = base(kind, ["POSITIVE", "Neutral", "NEGATIVE"])
    head, found = opened(recipe, ("negative", "neutral", "positive"), 3)
    (body, logits), (own_body, own_logits) = body_and_logits(model), body_and_logits(found)
    assert not head.is_new and head.line is not None and "goes on" in head.line and "POSITIVE" in head.line
    assert torch.equal(body, own_body) and torch.equal(own_logits, logits[:, [2, 1, 0]])
    assert names_of(found.config) == ("negative", "neutral", "positive")


NEW = {
    "other names": (["sports", "politics"], {}, ("neg", "pos"), 2, ["sports, politics", "neg, pos"]),
    "more classes": (["sports", "politics", "weather"], {}, ("neg", "pos"), 2, ["weather"]),
    "data without names": (["POSITIVE", "NEGATIVE"], {}, None, 2, ["POSITIVE", "2 without names"]),
    "a base without names": (None, {"num_labels": 2}, ("neg", "pos"), 2, ["2 classes without names", "neg, pos"]),
    "regression": (None, {"num_labels": 1, "problem_type": "regression"}, ("neg", "pos"), 2, ["predicts numbers"]),
    "one output of no stated kind": (None, {"num_labels": 1}, None, 2, ["predicts numbers"]),
    "several labels a text": (
        ["neg", "pos"], {"problem_type": "multi_label_classification"}, ("neg", "pos"), 2, ["multi_label"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", NEW)
def test_a_head_of_another_task_is_drawn_anew_and_a_line_says_so(base, kind, case):
    names, more, new_names, classes, said = NEW[case]
    recipe, model = base(kind, names, **more)
    head, found = opened(recipe, new_names, classes)
    assert head.is_new and head.line is not None and head.line.startswith("new: ")
    assert all(part in head.line for part in said), head.line
    (body, logits), (own_body, own_logits) = body_and_logits(model), body_and_logits(found)
    assert torch.equal(body, own_body) and own_logits.shape == (2, classes)
    if logits.shape == own_logits.shape:
        assert not torch.isclose(own_logits, logits).any()
    assert found.config.problem_type == SINGLE and names_of(found.config) == new_names
    _, again = opened(recipe, new_names, classes)
    assert torch.equal(body_and_logits(again)[1], own_logits)  # drawn from the seed
    layers = [m for n, m in found.named_modules() if isinstance(m, torch.nn.Linear) and "classifier" in n]
    assert all(not layer.bias.any() and 0.01 < layer.weight.std() < 0.03 for layer in layers)


def test_classes_without_names_on_both_sides_go_on(base):
    recipe, model = base(num_labels=2)
    head, found = opened(recipe, None, 2)
    assert not head.is_new and head.line is not None and "goes on" in head.line
    assert torch.equal(body_and_logits(found)[1], body_and_logits(model)[1])


def test_a_base_that_is_no_classifier_gets_a_head_without_a_word(base, tmp_path):
    recipe, model = base()
    model.bert.save_pretrained(tmp_path / "base")
    head, found = opened(recipe, ("neg", "pos"), 2)
    assert head.is_new and head.line is None
    assert torch.equal(body_and_logits(found)[0], body_and_logits(model)[0])


OTHER_TASKS = {
    "tokens, as many classes": (BertForTokenClassification, {"num_labels": 2}, ("neg", "pos"), SINGLE),
    "tokens, other classes": (BertForTokenClassification, {"num_labels": 9}, ("neg", "pos"), SINGLE),
    "one of several choices, one output": (BertForMultipleChoice, {}, None, "regression"),
    "spans": (BertForQuestionAnswering, {"num_labels": 2}, ("neg", "pos"), SINGLE),
    "tokens of another type": (DistilBertForTokenClassification, {"num_labels": 2}, ("neg", "pos"), SINGLE),
}


@pytest.mark.parametrize("case", OTHER_TASKS)
def test_the_head_of_another_kind_of_task_is_no_start(base, tmp_path, case):
    model_class, more, names, kind = OTHER_TASKS[case]
    recipe, _ = base()
    sizes = DISTIL if "Distil" in model_class.__name__ else SMALL
    model = model_class(model_class.config_class(**sizes, **more))
    model.save_pretrained(tmp_path / "base")
    classes = len(names or [0])
    head, found = opened(recipe, names, classes, kind)
    assert head.is_new and head.line == f"new: the base is a {model_class.__name__}"
    ids = torch.arange(5, 15).view(2, 5)
    with torch.no_grad():
        states = [each.eval().base_model(ids).last_hidden_state for each in (model, found)]
    assert torch.equal(*states) and found.classifier.weight.shape[0] == found.config.num_labels == classes
    if hasattr(model, "classifier") and model.classifier.weight.shape == found.classifier.weight.shape:
        assert not torch.isclose(model.classifier.weight, found.classifier.weight).any()
    assert found.config.problem_type == kind and names_of(found.config) == names


def test_what_pretraining_left_of_a_head_goes_on(base, tmp_path):
    ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    recipe, _ = base()
    model = ModernBertForMaskedLM(ModernBertConfig(**SMALL, **ids))
    model.save_pretrained(tmp_path / "base")
    head, found = opened(recipe, ("neg", "pos"), 2)
    assert head.line is None and torch.equal(found.head.dense.weight, model.head.dense.weight)


def test_weights_of_a_file_stand_where_torch_puts_its_own(base):
    recipe, model = base()
    found = load_base_model(recipe, load_config(recipe), torch.device("cpu"))
    assert {tensor.data_ptr() % 64 for tensor in [*found.parameters(), *found.buffers()]} == {0}
    for (name, own), other in zip(found.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(own, other), name


def test_a_language_model_of_a_classifier_knows_no_classes(tmp_path):
    names = {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    sizes = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
    config = Qwen2Config(**sizes, **names, problem_type="multi_label_classification", pad_token_id=0)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    recipe = Recipe.from_values(
        model_name_or_path=str(tmp_path / "base"), dataset_name="x", output_dir="run", max_seq_length=16, tune="full"
    )
    model = load_base_model(recipe, load_config(recipe), torch.device("cpu"))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["Qwen2ForCausalLM"] and saved.get("problem_type") is None
    assert not {"id2label", "label2id"} & {key for key, value in saved.items() if value}
