"""A generated corpus of opinions, to try a classifier without a network or a file.

Neither the topic nor the length predicts the class, only the verdict does; the last one counts, because an opinion may
begin with what others think.
"""

import random
from collections.abc import Iterator
from typing import Any

from isotune.data.sources.source import builtin

_THINGS = ("film", "book", "meal", "hotel", "song", "game", "phone", "train ride", "garden", "museum")
_DETAILS = ("the start", "the end", "the price", "the staff", "the sound", "the view", "the colours", "the pace")
_VERDICTS = (
    ("dreadful", "a waste of time", "worse than nothing", "painfully dull"),
    ("ordinary", "neither good nor bad", "just about fine", "what anybody would expect"),
    ("wonderful", "a pure delight", "better than I dared to hope", "simply brilliant"),
)


@builtin("opinions", train=600, test=120)
def opinions(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Opinions in three classes, bad, middling and good, of one to seven sentences."""
    seen: set[str] = set()
    while len(seen) < count:
        label = len(seen) % len(_VERDICTS)
        thing = rng.choice(_THINGS)
        sentences = [f"I came across a {thing} in {rng.randrange(1950, 2030)}."]
        if rng.random() < 0.3:
            sentences.append(f"My friends called it {rng.choice(rng.choice(_VERDICTS))}.")
        for detail in rng.sample(_DETAILS, rng.randrange(5)):
            sentences.append(f"I looked closely at {detail}.")
        sentences.append(f"To me the {thing} was {rng.choice(_VERDICTS[label])}.")
        text = " ".join(sentences)
        if text not in seen:
            seen.add(text)
            yield {"text": text, "label": label}
