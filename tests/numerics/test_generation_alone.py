"""An answer is the one that its prompt alone would get: greedy as the stock pipeline, drawn as its row counts out."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.building import small_opt
from tests.causal_models import small_config
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, pipeline
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from isotune.evaluation.generation.base_rules import rules_of_base
from isotune.evaluation.generation.completion import CountedDraw, Decoding, Prompt, complete
from isotune.evaluation.models import GenerationModel, generation_model_named
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer

NEW_TOKENS = 24
TEXTS = [
    "Once upon a time",
    "The",
    "What is the capital of France? Tell me the capital of Peru, and where Lima lies, and then of Mali.",
    "Lily and Tom went to the park. They saw a big dog",
    "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it",
    "A cat",
    "Bonjour, où est la gare? 你好",
    "The " * 40,
    "What is the capital of Chad?",
]


@pytest.fixture(scope="module", params=["opt", pytest.param("llama", marks=pytest.mark.slow), "stories260K"])
def speaker(request, tmp_path_factory) -> GenerationModel:
    """A model in fp32 with few positions, one prompt of TEXTS nearly as long as those."""
    if request.param == "stories260K":
        shared_data = request.getfixturevalue("shared_data")
        return generation_model_named(str(shared_data / "checkpoints" / "stories260K"))
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "opt":
        small_opt(folder, max_position_embeddings=100, word_embed_proj_dim=16, init_std=0.3)
    else:
        tokenizer = builtin_tokenizer("builtin:opt-tiny")
        torch.manual_seed(3)
        geometry = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
        special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
        config = LlamaConfig(
            vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=100, initializer_range=0.3,
            **geometry, **special,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return generation_model_named(str(folder))


@pytest.fixture(scope="module")
def prompts(speaker) -> list[Prompt]:
    fitting = [text for text in TEXTS if speaker.token_count(text) < speaker.positions]
    longest = "The " * speaker.positions
    while speaker.token_count(longest) > speaker.positions - 5:
        longest = longest[: -len("The ")]
    assert speaker.token_count(longest) + NEW_TOKENS > speaker.positions > speaker.token_count(longest)
    return [Prompt(100 + number, text) for number, text in enumerate([*fitting, longest])]


def each_alone(speaker: GenerationModel, prompts: list[Prompt]) -> dict[int, tuple[str, list[int]]]:
    """Text and tokens of transformers' own pipeline, one prompt after the other, on the model loaded anew."""
    model = AutoModelForCausalLM.from_pretrained(speaker.model.name_or_path)
    alone = pipeline("text-generation", model=model, tokenizer=speaker.tokenizer)
    found = {}
    for prompt in prompts:
        room = speaker.positions - speaker.token_count(prompt.text)
        how = {"max_new_tokens": min(NEW_TOKENS, room), "do_sample": False, "clean_up_tokenization_spaces": False}
        (said,) = alone(prompt.text, return_full_text=False, **how)
        (tokens,) = alone(prompt.text, return_tensors=True, **how)
        found[prompt.row] = said["generated_text"], tokens["generated_token_ids"][speaker.token_count(prompt.text) :]
    return found


def test_greedy_batches_are_the_pipeline_on_each_prompt_alone_token_for_token(speaker, prompts):
    expected = each_alone(speaker, prompts)
    for batch_size in (1, 3, 64):
        found = complete(speaker, prompts, Decoding(NEW_TOKENS), batch_size=batch_size, turns=False)
        assert sorted(found) == [prompt.row for prompt in prompts]
        for prompt in prompts:
            text, tokens = expected[prompt.row]
            completion = found[prompt.row]
            eos = [speaker.tokenizer.eos_token_id] if completion.ended else []
            assert [*completion.tokens, *eos] == tokens, prompt
            assert completion.text == text, prompt
    assert len({tuple(tokens) for _, tokens in expected.values()}) > 3, "the model says one thing to everything"


@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.5, "do_sample": True, "temperature": 0.7, "top_k": 3},
        {"num_beams": 4, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
        {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True},
        {"min_new_tokens": 9, "suppress_tokens": [5, 6, 7], "begin_suppress_tokens": [8]},
        {"max_new_tokens": 2, "max_length": 3, "forced_eos_token_id": 9, "bad_words_ids": [[20], [21]]},
        {"output_scores": True, "return_dict_in_generate": True, "use_cache": False},
        {"stop_strings": ["e"], "max_time": 0.0},
    ],
    ids=lambda rules: next(iter(rules)),
)
def test_rules_of_the_base_decide_nothing(speaker, prompts, monkeypatch, rules):
    greedy, drawn, prompts = Decoding(6), Decoding(6, temperature=1.0, top_p=0.9), prompts[:4]
    expected = [complete(speaker, prompts, decoding, batch_size=2) for decoding in (greedy, drawn)]
    own = speaker.model.generation_config
    ruled = GenerationConfig(**{**own.to_diff_dict(), **rules})
    monkeypatch.setattr(speaker.model, "generation_config", ruled)
    assert [complete(speaker, prompts, decoding, batch_size=3) for decoding in (greedy, drawn)] == expected
    assert speaker.model.generation_config is ruled
    named = {"max_new_tokens", "max_length", "output_scores", "return_dict_in_generate", "use_cache"}
    assert rules_of_base(speaker.model) == {name: value for name, value in rules.items() if name not in named}


def test_a_drawn_answer_depends_on_neither_batch_nor_order(speaker, prompts):
    decoding = Decoding(NEW_TOKENS, temperature=1.0, top_p=0.95, seed=5)
    expected = complete(speaker, prompts, decoding, batch_size=64, turns=False)
    for batch_size, asked in ((1, prompts), (3, prompts[::-1]), (64, prompts[2:5])):
        found = complete(speaker, asked, decoding, batch_size=batch_size, turns=False)
        assert found == {prompt.row: expected[prompt.row] for prompt in asked}


def test_rows_and_seeds_draw_differently(speaker):
    asked = [Prompt(row, "The") for row in range(6)]
    found = complete(speaker, asked, Decoding(8, temperature=1.0), turns=False)
    assert len({completion.tokens for completion in found.values()}) > 3
    other = complete(speaker, asked, Decoding(8, temperature=1.0, seed=1), turns=False)
    assert sum(other[row].tokens == found[row].tokens for row in found) < 3


def test_a_prompt_as_long_as_the_model_is_named(speaker):
    with pytest.raises(UserError, match=r"row 3 of rows\.jsonl has .* tokens, and the model"):
        complete(speaker, [Prompt(2, "The " * 600, "row 3 of rows.jsonl")], Decoding(4))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    rows, decoding = 20_000, Decoding(2, temperature=1.0)
    scores = torch.log(torch.tensor([0.5, 0.0, 0.2, 0.25, 0.05]))
    draw = CountedDraw(decoding, range(rows), prompt_tokens=1)
    for place in (1, 2):  # both places of an answer
        (drawn,) = np.array(draw(torch.zeros(rows, place, dtype=torch.long), scores.expand(rows, -1)).argmax(-1))[None]
        shares = np.bincount(drawn, minlength=5) / rows
        for share, probability in zip(shares, [0.5, 0.0, 0.2, 0.25, 0.05], strict=True):
            assert abs(share - probability) <= 4 * (probability * (1 - probability) / rows) ** 0.5
    first, second = (draw(torch.zeros(rows, n, dtype=torch.long), scores.expand(rows, -1)).argmax(-1) for n in (1, 2))
    together = ((first == 0) & (second == 0)).float().mean().item()
    assert abs(together - 0.25) <= 4 * (0.25 * 0.75 / rows) ** 0.5, "the places of a row depend on each other"


@pytest.mark.parametrize(("kind", "says"), [
    ("rwkv", "each prompt is generated from alone: rows of a batch"),
    ("recurrent_gemma", "prompts of one length are a batch: rows of a batch"),
    ("mamba", ""),
])  # fmt: skip
def test_prompts_are_no_batch_where_a_model_lets_them_change_each_other(kind, says, capfd):
    """All but RWKV have no limit of positions either, and no number of the tokenizer's stands for one."""
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    torch.manual_seed(4)
    layers = {"num_hidden_layers": 3} if kind == "recurrent_gemma" else {}  # its third has attention
    config = small_config(kind, vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=2, eos_token_id=2, **layers)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    lm = GenerationModel(model, tokenizer)
    assert (lm.last_position is None) == (kind != "rwkv")
    prompts = [Prompt(number, text) for number, text in enumerate(["The", "A cat", "Lily", "One day, a girl", "Two"])]
    alone = {}
    for prompt in prompts:
        alone |= complete(lm, [prompt], Decoding(6), turns=False)
    assert "note " not in capfd.readouterr().err
    assert complete(lm, prompts, Decoding(6), turns=False) == alone
    said = capfd.readouterr().err
    assert said.count("note ") == bool(says) and says in said
    assert complete(lm, prompts, Decoding(6), turns=False) == alone
    assert "note " not in capfd.readouterr().err
