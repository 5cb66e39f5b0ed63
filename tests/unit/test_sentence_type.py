"""Commands, statements and questions, by explicit examples and on every real prompt."""

import csv

import pytest

from isotune.projects.prompts import KINDS, sentence_type

EXAMPLES = {
    "question": [
        "What is the capital of France?", "Is it late", "can you tell me where the station is", "How do magnets work.",
        "You saw it, didn't you?", "“Who is it?”.", "You will come tomorrow?", "Will you come? Tell me.",
        "Hello there! Why is the sky blue", "The train is late again?", "Don't you like it", "  (Why not?)  ",
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
        "We will see.", "Actors act.", "Writing is hard.",
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
