"""A chat on the terminal with a run's model; the same lines from a pipe give the same answers."""

import sys
from collections.abc import Callable
from dataclasses import replace

from isotune.evaluation.generation.batched_generation import GenerationModel
from isotune.evaluation.generation.decoding import Decoding
from isotune.evaluation.generation.generation_models import answer, fit_history
from isotune.io.errors import UserError

BANNER = "A chat with {name}. /reset clears the history; /quit or Ctrl-D ends it; Ctrl-C stops an answer."
COMMANDS = ("/reset", "/quit")


class Chat:
    """A conversation: a question is sent with the exchanges before it, as far as the model has positions.

    Sampling of turn n is seeded with `seed + n`, so the same conversation has the same answers.
    """

    def __init__(self, lm: GenerationModel, decoding: Decoding) -> None:
        self.lm = lm
        self.decoding = decoding
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        """Answer, and add both to the history; a question that fails is not added.

        Raises:
            UserError: the question alone leaves the model no position for an answer.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = fit_history(self.lm, messages, self.decoding.max_new_tokens)
        turn = replace(self.decoding, seed=self.decoding.seed + len(self.messages) // 2)
        text = answer(self.lm, prompt, turn)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

    def reset(self) -> None:
        """Clear the history."""
        self.messages = []


def run_chat(lm: GenerationModel, decoding: Decoding, name: str) -> None:
    """Answer the lines of stdin until its end or /quit.

    A terminal shows a prompt; from a pipe, stdout holds the answers alone.
    """
    chat = Chat(lm, decoding)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(BANNER.format(name=name), flush=True)
    read = _read_terminal if at_terminal else _read_pipe
    while (line := _next_line(read)) is not None:
        question = line.strip()
        if question == "/quit":
            return
        if question == "/reset":
            chat.reset()
        elif question.startswith("/") and question[1:].isalpha():
            print(f"{question} is no command: there are {' and '.join(COMMANDS)}", file=sys.stderr, flush=True)
        elif question:
            _answer(chat, question)


def _answer(chat: Chat, question: str) -> None:
    try:
        print(chat.ask(question), flush=True)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("(stopped)", file=sys.stderr, flush=True)


def _next_line(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()  # so that the shell's prompt starts on a new line
        return None


def _read_terminal() -> str:
    return input("\n> ")


def _read_pipe() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
