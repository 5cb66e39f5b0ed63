"""Commands, statements and questions, by explicit examples and on every real prompt."""

import csv
import json
from collections import Counter

import numpy as np
import pytest

from isotune.config import ClassificationRecipe
from isotune.data.classification.split import prepare_labelled
from isotune.models.opening import load_tokenizer
from isotune.projects.prompts import KINDS, sentence_type

EXAMPLES = {
    "question": [
        "What is the capital of France?", "Is it late", "can you tell me where the station is", "How do magnets work.",
        "You saw it, didn't you?", "“Who is it?”.", "You will come tomorrow?", "Will you come? Tell me.",
        "Hello there! Why is the sky blue", "The train is late again?", "Don't you like it", "  (Why not?)  ",
        '"It is late?"', 'He said "no", did he?',
    ],
    "command": [
        "I want you to act as a linux terminal. I will type commands.", "Please be quiet.", "Please", "Write a poem.",
        "let's go home", "Let’s go home.", "I'd like you to answer in French.", "You must never lie.", "Don't move.",
        '"Act as a doctor."', "Hi ChatGPT. Translate this sentence.", "Your task is to sum these numbers.", "Stop!",
        'I want you to act as a guide. My first question is "Where am I?"', "You must answer this: who is it?",
        "Tell me, is it late?", "You are now a judge. Who is right?",
        "I need you to calm down.", "Never say never.", "Imagine that you are a bird.", "- List three colours.",
    ],
    "statement": [
        "The museum opens at nine.", "It has been raining all day.", "I want a holiday.", "", "   ", "?!",
        "Help is on its way.",
        "What a pity that was!", "Whatever you say is fine.", "I like you.", "Paris is the capital of France.", "...",
        "We will see.", "Actors act.", "Writing is hard.", 'Seeking advice. First query - "What is best?"',
        "He asked: “Who is it?”.", "The sign says «Why not?»",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in EXAMPLES.items() for text in texts])
def test_the_rules_say_what_a_reader_says(kind, text):
    assert KINDS[sentence_type(text)] == kind


def test_real_prompts_that_begin_as_an_order_are_commands_whatever_they_quote_at_the_end(shared_data):
    with (shared_data / "prompts" / "prompts.csv").open(encoding="utf-8", newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file, skipinitialspace=True)]
    kinds = [KINDS[sentence_type(prompt)] for prompt in prompts]
    assert len(prompts) == 153 and kinds.count("command") > 120
    quoting = [prompt.endswith(("?", '?"')) for prompt in prompts]
    orders = [prompt.startswith(("I want you to", "You will", "Act as")) for prompt in prompts]
    told = [kind for kind, order in zip(kinds, orders, strict=True) if order]
    assert sum(q and o for q, o in zip(quoting, orders, strict=True)) > 10
    assert set(told) == {"command"}


def prompts_of(shared_data) -> list[str]:
    with (shared_data / "prompts" / "prompts.csv").open(encoding="utf-8", newline="") as file:
        return [row["prompt"] for row in csv.DictReader(file, skipinitialspace=True)]


def test_the_rules_agree_with_a_sample_that_was_labelled_by_hand_as_the_docs_say(shared_data, repository):
    prompts = prompts_of(shared_data)
    hand = json.loads((repository / "tests" / "fixtures" / "prompts_by_hand.json").read_text())["labels"]
    found = {row: KINDS[sentence_type(prompts[int(row)])] for row in hand}
    agreed = [row for row, kind in hand.items() if found[row] == kind]
    assert len(hand) == 100 and Counter(hand.values()) == {"command": 97, "statement": 2, "question": 1}
    assert len(agreed) == 97
    page = (repository / "docs" / "classification.md").read_text()
    assert f"{len(agreed)} of {len(hand)} prompts that were labelled by hand" in " ".join(page.split())


@pytest.mark.parametrize("seed", [0, 1, 42, 43])
def test_a_statement_stands_in_both_shares(shared_data, seed, tmp_path):
    values = {"model_name_or_path": "builtin:bert-tiny", "output_dir": str(tmp_path), "seed": seed}
    values |= {"dataset_name": str(shared_data / "prompts" / "prompts.csv"), "dataset_text_field": "prompt"}
    recipe = ClassificationRecipe.from_values(**values, label_source="rules", eval_split_share=0.1)
    data = prepare_labelled(recipe, load_tokenizer(recipe), show=False)
    assert data.evaluation is not None
    shares = [set(np.unique(part.documents.labels).tolist()) for part in (data.train, data.evaluation)]
    assert shares == [{0, 1, 2}] * 2
    rows = [part.documents.source_rows.tolist() for part in (data.train, data.evaluation)]
    assert sorted(rows[0] + rows[1]) == list(range(153))
