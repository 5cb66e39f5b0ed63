"""Settings in a base's files that nobody asked for: not in effect and written down, or named by their file."""

import json
from pathlib import Path

import pytest
import torch
from tests.building import build, small_encoder, small_opt
from transformers import AutoConfig, AutoModelForSequenceClassification

from isotune.evaluation.generation.base_rules import rules_of_base
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.models import GenerationModel, generation_model_named, load_model_classifier
from isotune.io.errors import UserError

PROMPTS = [Prompt(row, f"### Human: {text}\n### Assistant:") for row, text in enumerate(["Hi", "What is it then?"])]
# what some published files ask for beside the logits
OUTPUTS = [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True, "torchscript": True}]


def with_keys(folder: str, file: str, **keys: object) -> str:
    path = Path(folder, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def opened(folder: str) -> GenerationModel:
    return generation_model_named(folder, torch.device("cpu"))


def answers(lm: GenerationModel, batch_size: int = 2) -> list[tuple[int, ...]]:
    completions = complete(lm, PROMPTS, Decoding(max_new_tokens=4), batch_size=batch_size)
    return [completions[prompt.row].tokens for prompt in PROMPTS]


@pytest.mark.parametrize(
    "rules",
    [
        {"watermarking_config": {"bias": 2.5, "greenlist_ratio": 0.25}},
        {"suppress_tokens": [5, 6], "begin_suppress_tokens": [5], "forced_eos_token_id": 7},
        {"num_return_sequences": 3, "do_sample": True, "typical_p": 0.3},
        {"stop_strings": ["e"], "max_time": 1e-4, "min_length": 40, "bad_words_ids": [[5], [6, 7]]},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.6},  # which transformers refuses to save
    ],
)
def test_rules_of_a_base_change_no_answer_and_are_written_down(tmp_path, rules):
    plain = answers(opened(small_opt(tmp_path / "plain")))
    lm = opened(with_keys(small_opt(tmp_path / "ruled"), "generation_config.json", **rules))
    assert [answers(lm, size) for size in (1, 2)] == [plain, plain]
    written = json.loads(json.dumps(rules_of_base(lm.model)))
    assert rules.keys() == written.keys()
    for name, value in rules.items():
        own = {key: written[name][key] for key in value} if isinstance(value, dict) else written[name]
        assert own == value


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not a valid JSON"),
        ('{"max_new_tokens": "12"}', "not supported between instances of 'str'"),
        ('{"max_new_tokens": 0}', "max_new_tokens. must be greater than 0"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_named_and_not_the_weights(tmp_path, content, why):
    folder = small_opt(tmp_path / "base")
    Path(folder, "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=f"^generation_config.json of '{folder}' cannot be read: .*{why}"):
        opened(folder)
    Path(folder, "generation_config.json").unlink()  # most models have none
    assert opened(folder).eos_ids


def test_an_end_that_is_no_token_is_named(tmp_path):
    lm = opened(with_keys(small_opt(tmp_path / "base"), "generation_config.json", eos_token_id=["</s>"]))
    with pytest.raises(UserError, match=r"eos_token_id of .*/generation_config.json holds '</s>': write the numbers"):
        answers(lm)


@pytest.mark.parametrize(
    "asked", [*(pytest.param(asked, marks=pytest.mark.slow) for asked in OUTPUTS[:-1]), OUTPUTS[-1]]
)
def test_what_a_configuration_asks_for_beside_the_logits_changes_no_run_and_no_evaluation(tmp_path, asked):
    plain, other = small_opt(tmp_path / "plain"), with_keys(small_opt(tmp_path / "other"), "config.json", **asked)
    assert answers(opened(other)) == answers(opened(plain))
    lines = [
        build(tmp_path / name, model_name_or_path=base, max_steps=2, save_strategy="no").train()
        for name, base in (("one", plain), ("two", other))
    ]
    losses = [[line["loss"] for line in own if "loss" in line] for own in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_classifier_whose_configuration_asks_for_tuples_is_evaluated(tmp_path):
    folder = small_encoder(tmp_path / "base", "bert")
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=2))
    model.save_pretrained(folder)
    with_keys(folder, "config.json", return_dict=False, output_hidden_states=True)
    classifier = load_model_classifier(folder, torch.device("cpu"), torch.float32)
    assert classifier.model.config.return_dict and not classifier.model.config.output_hidden_states
