"""Answers of a finished run, through the pipeline that its users will use, from the prompt that it was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isotune.data.conversations import HEADER, HUMAN_HEADER, render_prompt
from isotune.data.hub import first_line, is_hub_id
from isotune.errors import UserError
from isotune.models.finished_run import LOADING_ERRORS, load_run_model, load_run_tokenizer, load_weights, read_run
from isotune.models.quiet import quiet_libraries

Messages = Sequence[Mapping[str, str]]

# A byte-level tokenizer without merges needs one token a character of the header, and a few before it.
_HEADER_TOKENS = len(HUMAN_HEADER) + 6


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token (greedy); above it tokens are drawn.
        top_p: draw among the likeliest tokens that hold this share of the probability (Holtzman et al. 2020).
        seed: of the draw; the same seed gives the same answer.

    Raises:
        UserError: a value out of its range, or one without effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens is {self.max_new_tokens}: an answer takes at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}: it may be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}: it is a share of the probability, above 0 and at most 1")
        if self.temperature == 0 and self.top_p < 1:
            raise UserError("--top_p has no effect on greedy decoding: give a --temperature above 0 too")


def load_run_generator(run_dir: str | Path) -> Any:
    """The text-generation pipeline of a finished run, a whole model or an adapter on its base.

    Raises:
        UserError: no finished run, or its model cannot be loaded.
    """
    run = read_run(run_dir)
    model = load_run_model(run, best_device())
    # The pipeline knows models and not adapters; peft's layers stay in place inside the model that they adapt.
    return _pipeline(model.get_base_model() if run.is_adapter else model, load_run_tokenizer(run))


def load_model_generator(name: str) -> Any:
    """The text-generation pipeline of any model with weights in safetensors: a folder or a Hub id.

    Raises:
        UserError: it cannot be loaded, or is an adapter.
    """
    from transformers import AutoTokenizer

    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"--model {name} is an adapter without its base: give the folder of its run with --run_dir")
    if not Path(name).is_dir() and not is_hub_id(name):
        raise UserError(f"there is no model folder {name}")
    model = load_weights(name, dtype="auto").to(best_device()).eval()
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(name)
    except LOADING_ERRORS as error:
        raise UserError(f"the tokenizer of {name} cannot be loaded: {first_line(error)}") from error
    return _pipeline(model, tokenizer)


def best_device() -> torch.device:
    """A CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answer(generator: Any, question: str | Messages, decoding: Decoding | None = None) -> str:
    """The model's answer to a question, or to the last of several messages.

    The prompt is the one of training, the tokenizer adds its bos, and the answer ends at eos or where the model begins
    another turn. Nothing but the model, the messages and `decoding` decides it: torch's generators are left as they
    were.

    Args:
        generator: what `load_run_generator` returned.
        question: a text, or messages with `role` and `content`, a user's last.
        decoding: greedy where not given.

    Raises:
        UserError: the prompt leaves the model no position for an answer.
    """
    from transformers import StoppingCriteriaList

    decoding = decoding or Decoding()
    prompt = render_prompt(question)
    prompt_tokens = len(generator.tokenizer(prompt)["input_ids"])
    positions = position_count(generator)
    if prompt_tokens >= positions:
        raise UserError(f"the prompt has {prompt_tokens} tokens, and the model {positions} positions: shorten it")
    drawn = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    devices = [generator.device] if generator.device.type == "cuda" else []
    with quiet_libraries(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(decoding.seed)
        (continued,) = generator(
            prompt,
            return_full_text=False,
            clean_up_tokenization_spaces=False,
            max_new_tokens=min(decoding.max_new_tokens, positions - prompt_tokens),
            eos_token_id=generator.tokenizer.eos_token_id,
            pad_token_id=generator.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([_next_turn_criterion(generator.tokenizer, prompt_tokens)]),
            **(drawn if decoding.temperature > 0 else {"do_sample": False}),
        )
    return first_turn(continued["generated_text"])


def first_turn(text: str) -> str:
    """What stands before the header of another turn, as training reads headers, without the white space around it."""
    start = _header_start(text)
    return text[:start].strip()


def fit_history(generator: Any, messages: Messages, max_new_tokens: int) -> list[Mapping[str, str]]:
    """The newest messages whose prompt leaves room for an answer; the last one always stays.

    The room is `max_new_tokens`, but at most a quarter of the model's positions: a longer allowance is for the model
    to use where it can, not a reason to forget what was said. Whole exchanges are dropped, the oldest first, so that
    a prompt begins with a question as in training.
    """
    kept = list(messages)
    positions = position_count(generator)
    room = positions - min(max_new_tokens, positions // 4)
    while len(kept) > 1 and len(generator.tokenizer(render_prompt(kept))["input_ids"]) > room:
        kept = kept[2:]
    return kept


def position_count(generator: Any) -> int:
    """The positions of the generator's model; without a limit of its own, the tokenizer's."""
    return getattr(generator.model.config, "max_position_embeddings", None) or generator.tokenizer.model_max_length


def print_sample_answer(run_dir: str | Path, question: str, max_new_tokens: int = 128) -> None:
    """Print what a finished run's model answers greedily, loaded from the run's folder as its user will load it."""
    text = answer(load_run_generator(run_dir), question, Decoding(max_new_tokens=max_new_tokens))
    print(f"{render_prompt(question)} {text}", flush=True)


def _pipeline(model: Any, tokenizer: Any) -> Any:
    from transformers import pipeline

    # A model that a device map placed, as 4-bit weights are, must not be moved again.
    where = {} if getattr(model, "hf_device_map", None) else {"device": model.device}
    with quiet_libraries():
        return pipeline("text-generation", model=model, tokenizer=tokenizer, **where)


def _header_start(text: str) -> int | None:
    return next((h.start() for h in HEADER.finditer(text) if text[h.start() - 1 : h.start()] != "#"), None)


def _next_turn_criterion(tokenizer: Any, prompt_tokens: int) -> Any:
    """Stop as soon as the model writes a header: what follows would be an invented question."""
    from transformers import StoppingCriteria

    class NextTurn(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            # input_ids: [1, prompt and answer so far]; only the end can hold a header that was not there before.
            newest = input_ids[0, max(prompt_tokens, input_ids.shape[1] - _HEADER_TOKENS) :]
            ended = _header_start(tokenizer.decode(newest, skip_special_tokens=True)) is not None
            return torch.tensor([ended], device=input_ids.device)

    return NextTurn()
