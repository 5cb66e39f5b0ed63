"""Corpora made by code, so that a test or a demo needs neither a network nor a file."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from isotune.config.kinds import load_projects
from isotune.io.errors import UserError
from isotune.io.near_names import nearest

PREFIX = "builtin:"
SEED = 20_240_607

Generator = Callable[[random.Random, int], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Corpus:
    """A registered generator and how many rows each of its splits has."""

    name: str
    description: str
    split_rows: dict[str, int]
    generate: Generator

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of one split.

        All splits are cut from one stream of distinct rows: what is in `test` is never in `train`.
        """
        if split not in self.split_rows:
            raise UserError(f"{PREFIX}{self.name} has no split {split!r}; it has {', '.join(self.split_rows)}")
        stream = list(self.generate(random.Random(SEED), sum(self.split_rows.values())))
        distinct = {json.dumps(row, sort_keys=True) for row in stream}
        assert len(stream) == len(distinct) == sum(self.split_rows.values()), f"{self.name} repeats or lacks rows"
        start = 0
        for name, count in self.split_rows.items():
            if name == split:
                return stream[start : start + count]
            start += count
        raise AssertionError(split)


CORPORA: dict[str, Corpus] = {}


def builtin(name: str, *, train: int, test: int) -> Callable[[Generator], Generator]:
    """Register a generator as `builtin:NAME`.

    The generator gets a seeded `random.Random` and the number of rows wanted, and yields that many distinct rows;
    the first `train` of them are the split `train`, the others `test`. The first line of its docstring describes
    the corpus.
    """

    def register(generate: Generator) -> Generator:
        assert name not in CORPORA, f"two built-in corpora are called {name}"
        description = (generate.__doc__ or "").strip().splitlines()[0]
        CORPORA[name] = Corpus(name, description, {"train": train, "test": test}, generate)
        return generate

    return register


def find_corpus(dataset_name: str) -> Corpus:
    """The corpus that `builtin:NAME` stands for.

    Raises:
        UserError: there is none of that name; the sentence names the nearest.
    """
    load_projects()
    name = dataset_name.removeprefix(PREFIX)
    if name not in CORPORA:
        near = nearest(name, CORPORA, cutoff=0.0)
        raise UserError(
            f"there is no built-in corpus {name!r}: did you mean {PREFIX}{near}? "
            f"There are: {', '.join(sorted(CORPORA))}"
        )
    return CORPORA[name]


GREETINGS = {
    "Dutch": ("Goedemorgen", "Welterusten"),
    "English": ("Good morning", "Good night"),
    "French": ("Bonjour", "Bonne nuit"),
    "German": ("Guten Morgen", "Gute Nacht"),
    "Italian": ("Buongiorno", "Buona notte"),
    "Portuguese": ("Bom dia", "Boa noite"),
    "Spanish": ("Buenos días", "Buenas noches"),
    "Turkish": ("Günaydın", "İyi geceler"),
}
NAMES = ("Ada", "Alan", "Barbara", "Claude", "Donald", "Edsger", "Frances", "Grace", "Ken", "Leslie", "Tony", "Yann")


@builtin("greetings", train=80, test=16)
def greetings(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Greetings in eight languages, in two turns each: small enough for an end-to-end test."""
    pairs = [(name, language) for name in NAMES for language in sorted(GREETINGS)]
    for name, language in rng.sample(pairs, count):
        morning, night = GREETINGS[language]
        yield {
            "messages": [
                {"role": "user", "content": f"Greet {name} in {language}."},
                {"role": "assistant", "content": f"{morning}, {name}!"},
                {"role": "user", "content": "And at night?"},
                {"role": "assistant", "content": f"{night}, {name}!"},
            ]
        }
