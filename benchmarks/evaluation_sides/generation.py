"""Greedy answers to real first questions of Guanaco: the harness in batches, transformers' pipeline one by one.

The model has OPT-125M's geometry (or a smaller one) and random weights, in fp32 with OPT's own tokenizer, so no answer
ends early and both sides make the same number of tokens. They must be the same tokens. Questions are as long as people
wrote them. In a round both sides answer all of them, one after the other, and the next round begins with the other
side; the ratio is taken within a round, then its median.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, pipeline

from isotune.data.sources.source import read_rows
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.models import GenerationModel
from isotune.evaluation.tasks import eval_samples_of
from isotune.models.log_control import quiet_libraries

LONGEST_PROMPT_TOKENS = 512
TO_REACH = 2.0


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both sides in every round, and their ratio."""
    tokenizer = AutoTokenizer.from_pretrained(str(given.data / "tokenizers" / "opt"))
    speaker = GenerationModel(random_opt(len(tokenizer), given.layers), tokenizer)
    asked = eval_samples_of(read_rows(str(given.data / "guanaco" / "train.jsonl"), "train"))
    prompts = [Prompt(q.id, speaker.encoder.prompt(q.messages)) for q in asked]
    prompts = [p for p in prompts if speaker.token_count(p.text) <= LONGEST_PROMPT_TOKENS][: given.prompts]
    alone: Any = pipeline("text-generation", model=speaker.model, tokenizer=tokenizer)

    def in_batches() -> dict[int, list[int]]:
        found = complete(speaker, prompts, Decoding(given.new_tokens), batch_size=given.batch_size, turns=False)
        return {row: list(completion.tokens) for row, completion in found.items()}

    def one_by_one() -> dict[int, list[int]]:
        how: dict[str, Any] = {"max_new_tokens": given.new_tokens, "do_sample": False, "return_tensors": True}
        with quiet_libraries():
            said = {p.row: alone(p.text, **how)[0]["generated_token_ids"] for p in prompts}
        return {p.row: said[p.row][speaker.token_count(p.text) :] for p in prompts}

    sides = {"isotune": in_batches, "pipeline": one_by_one}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(given.rounds):
        made = {}
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            started = time.perf_counter()
            made[name] = sides[name]()
            rates[name].append(sum(map(len, made[name].values())) / (time.perf_counter() - started))
        assert made["isotune"] == made["pipeline"], "the sides gave different tokens"
    ratios = [ours / theirs for ours, theirs in zip(rates["isotune"], rates["pipeline"], strict=True)]
    lengths = sorted(speaker.token_count(p.text) for p in prompts)
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {given.new_tokens} new tokens each")
    for name, found in rates.items():
        print(f"  {name:<9} {statistics.median(found):7.1f} tokens/s ({min(found):.1f} to {max(found):.1f})")
    print(f"  ratio     {statistics.median(ratios):7.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return {
        "prompts": len(prompts),
        "prompt_tokens": [lengths[0], statistics.median(lengths), lengths[-1]],
        "new_tokens": given.new_tokens,
        "batch_size": given.batch_size,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "ratio": statistics.median(ratios),
        "reached": statistics.median(ratios) >= TO_REACH,
        "ratios": ratios,
    }


def random_opt(vocabulary: int, layers: int) -> OPTForCausalLM:
    """OPT-125M's geometry with fewer layers where asked, with weights that make it say more than one thing."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary, hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_hidden_layers=layers,
        num_attention_heads=12, max_position_embeddings=2048, pad_token_id=1, init_std=0.1,
    )  # fmt: skip
    model: Any = OPTForCausalLM(config).eval()
    model.generation_config.eos_token_id = 2
    return model
