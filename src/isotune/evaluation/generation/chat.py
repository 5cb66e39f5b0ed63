"""A small chat on the terminal, to see what a run has learnt; the same lines from a pipe give the same answers."""

import sys
from collections.abc import Callable
from dataclasses import replace

from isotune.evaluation.generation.batched_generation import GenerationModel
from isotune.evaluation.generation.decoding import Decoding
from isotune.evaluation.generation.generation_models import answer, fit_history
from isotune.io.errors import UserError

BANNER = "A chat with {name}. /reset forgets it so far; /quit or Ctrl-D ends it; Ctrl-C stops an answer."
COMMANDS = ("/reset", "/quit")


class Chat:
    """A conversation: each question is asked with the exchanges before it, as far as the model has positions.

    The draw of turn n is seeded with `seed + n`, so a conversation typed again has the same answers.
    """

    def __init__(self, speaker: GenerationModel, decoding: Decoding) -> None:
        self.speaker = speaker
        self.decoding = decoding
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        """Answer, and remember both; a question that fails is not remembered.

        Raises:
            UserError: the question alone leaves the model no position for an answer.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = fit_history(self.speaker, asked, self.decoding.max_new_tokens)
        turn = replace(self.decoding, seed=self.decoding.seed + len(self.messages) // 2)
        text = answer(self.speaker, prompt, turn)
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text

    def reset(self) -> None:
        """Forget everything said so far."""
        self.messages = []


def run_chat(speaker: GenerationModel, decoding: Decoding, name: str) -> None:
    """Answer the lines of stdin until it ends or says /quit.

    On a terminal with a prompt; from a pipe, stdout holds the answers and nothing else.
    """
    chat = Chat(speaker, decoding)
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
            print()  # the shell's prompt goes on a line of its own
        return None


def _read_terminal() -> str:
    return input("\n> ")


def _read_pipe() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
