"""Answers to questions, with the prompt of training: one answer, the sample of a run, or a chat on the terminal."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isotune.data.sft.messages import USER, Message, read_message
from isotune.evaluation.generation.completion import BATCH_SIZE, Decoding, Prompt, complete
from isotune.evaluation.models import GenerationModel, generation_model_of_run
from isotune.evaluation.samples import write_samples
from isotune.io.errors import UserError, first_line

Messages = Sequence[Mapping[str, Any]]

BANNER = "A chat with {name}. /reset clears the history; /quit or Ctrl-D ends it; Ctrl-C stops an answer."
COMMANDS = ("/reset", "/quit")


def answer(lm: GenerationModel, question: str | Messages, decoding: Decoding | None = None) -> str:
    """The model's answer to a question, or to the last of several messages.

    The prompt is the one of training, and the answer ends where the model ends it or begins another turn. It depends on
    the model, the messages and `decoding` (by default greedy) alone; torch's random state does not change. Messages
    have `role` and `content`, a user's last.
    """
    return answers(lm, [question], decoding)[0]


def answers(
    lm: GenerationModel,
    questions: Sequence[str | Messages],
    decoding: Decoding | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """The answer to each question as `answer` gives it; sampled ones are drawn by the number of the question."""
    prompts = [Prompt(number, prompt_of(lm, question)) for number, question in enumerate(questions)]
    completions = complete(lm, prompts, decoding or Decoding(), batch_size=batch_size)
    return [lm.encoder.answer_in(completions[prompt.row].text, prompt.text) for prompt in prompts]


def prompt_of(lm: GenerationModel, question: str | Messages) -> str:
    """The text that asks a model one question, or for an answer to messages; UserError for messages that it refuses."""
    asked: list[Message] = [{"role": USER, "content": question}] if isinstance(question, str) else []
    try:
        if not isinstance(question, str):
            asked = [read_message(message, number)[0] for number, message in enumerate(question, start=1)]
        return lm.encoder.prompt(asked)
    except ValueError as error:
        raise UserError(f"the messages cannot be asked: {error}") from error


def fit_history(lm: GenerationModel, messages: Messages, max_new_tokens: int) -> list[Mapping[str, Any]]:
    """The newest messages whose prompt leaves room for an answer; the last one always stays.

    The room is `max_new_tokens`, but at most a quarter of the model's positions, so that a high limit does not drop the
    history. Whole exchanges are dropped, the oldest first, so a prompt begins with a question as in training.
    """
    kept = list(messages)
    longest_prompt = lm.positions - min(max_new_tokens, lm.positions // 4)
    while len(kept) > 1 and lm.token_count(prompt_of(lm, kept)) > longest_prompt:
        kept = kept[2:]
    return kept


def print_sample_answer(run_dir: str | Path, question: str, max_new_tokens: int = 128) -> None:
    """Print the greedy answer of a finished run's model, loaded from the run's folder as its user will load it.

    It is kept in RUN/samples.json too.
    """
    try:
        lm = generation_model_of_run(run_dir)
        text = answer(lm, question, Decoding(max_new_tokens=max_new_tokens))
    except (UserError, RuntimeError) as error:  # of a model that takes several devices, say: the run is finished
        print(f"note        no sample answer of the saved model: {first_line(error)}", flush=True)
        return
    print(f"{prompt_of(lm, question)}{' ' if lm.encoder.template is None else ''}{text}", flush=True)
    write_samples(Path(run_dir), [{"input": question, "output": text}])


def run_chat(lm: GenerationModel, decoding: Decoding, name: str) -> None:
    """Answer the lines of stdin until its end or /quit, each with the exchanges before it that fit.

    A terminal shows a prompt; from a pipe, stdout holds the answers alone. Turn n is sampled with `seed + n`, so the
    same conversation has the same answers. A question that fails is not added to the history.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(BANNER.format(name=name), flush=True)
    history: list[Mapping[str, Any]] = []
    while (line := _next_line(at_terminal)) is not None:
        question = line.strip()
        if question == "/quit":
            return
        if question == "/reset":
            history = []
        elif question.startswith("/") and question[1:].isalpha():
            print(f"{question} is no command: there are {' and '.join(COMMANDS)}", file=sys.stderr, flush=True)
        elif question:
            try:
                asked = [*history, {"role": "user", "content": question}]
                turn = replace(decoding, seed=decoding.seed + len(history) // 2)
                text = answer(lm, fit_history(lm, asked, decoding.max_new_tokens), turn)
                history = [*asked, {"role": "assistant", "content": text}]
                print(text, flush=True)
            except UserError as mistake:
                print(f"error: {mistake}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print("(stopped)", file=sys.stderr, flush=True)


def _next_line(at_terminal: bool) -> str | None:
    """The next line of stdin, None at its end or on Ctrl-C."""
    try:
        return input("\n> ") if at_terminal else sys.stdin.readline() or None
    except (EOFError, KeyboardInterrupt):
        if at_terminal:
            print()  # so that the shell's prompt starts on a new line
        return None
