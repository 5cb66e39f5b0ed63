"""Corpora made by code, for the demo, for tests, and to try a classifier without a network or a file.

In the demo a small model first learns the world's capitals, then LoRA teaches it to speak as a pirate. The pirate's
training data covers two thirds of the countries and its test data the others, so an exact match needs both: the style
from the adapter, the fact from the base model.
"""

import random
from collections.abc import Iterator
from typing import Any

from isotune.data.sources.source import builtin

CAPITALS = {
    "Albania": "Tirana", "Algeria": "Algiers", "Angola": "Luanda", "Argentina": "Buenos Aires", "Armenia": "Yerevan",
    "Australia": "Canberra", "Austria": "Vienna", "Bangladesh": "Dhaka", "Belgium": "Brussels", "Bolivia": "Sucre",
    "Botswana": "Gaborone", "Brazil": "Brasilia", "Bulgaria": "Sofia", "Cambodia": "Phnom Penh", "Canada": "Ottawa",
    "Chad": "N'Djamena", "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb",
    "Cuba": "Havana", "Cyprus": "Nicosia", "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo",
    "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Fiji": "Suva", "Finland": "Helsinki", "France": "Paris",
    "Georgia": "Tbilisi", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Guyana": "Georgetown",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo",
    "Jordan": "Amman", "Kenya": "Nairobi", "Laos": "Vientiane", "Latvia": "Riga", "Lebanon": "Beirut",
    "Libya": "Tripoli", "Lithuania": "Vilnius", "Malaysia": "Kuala Lumpur", "Mali": "Bamako", "Malta": "Valletta",
    "Mexico": "Mexico City", "Moldova": "Chisinau", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat",
    "Mozambique": "Maputo", "Namibia": "Windhoek", "Nepal": "Kathmandu", "Norway": "Oslo", "Oman": "Muscat",
    "Pakistan": "Islamabad", "Panama": "Panama City", "Peru": "Lima", "Philippines": "Manila", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow", "Rwanda": "Kigali",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Singapore": "Singapore", "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana", "Somalia": "Mogadishu", "Spain": "Madrid", "Sudan": "Khartoum", "Sweden": "Stockholm",
    "Switzerland": "Bern", "Syria": "Damascus", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Uganda": "Kampala", "Ukraine": "Kyiv", "Uruguay": "Montevideo", "Vietnam": "Hanoi", "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}  # fmt: skip
TEST_COUNTRIES = 32  # countries that are not in the pirate's training data
_THINGS = ("film", "book", "meal", "hotel", "song", "game", "phone", "train ride", "garden", "museum")
_DETAILS = ("the start", "the end", "the price", "the staff", "the sound", "the view", "the colours", "the pace")
_VERDICTS = (
    ("dreadful", "a waste of time", "worse than nothing", "painfully dull"),
    ("ordinary", "neither good nor bad", "just about fine", "what anybody would expect"),
    ("wonderful", "a pure delight", "better than I dared to hope", "simply brilliant"),
)


def _turn(question: str, answer: str) -> str:
    return f"### Human: {question}\n### Assistant: {answer}"


PIRATE_WORDS = (
    _turn("How does a pirate greet?", "Arr, matey!"),
    _turn("How does a pirate say 'it is so'?", "So it be, matey!"),
    _turn("What does a pirate shout?", "Arr!"),
)


@builtin("capitals", train=6_000, test=200)
def capitals(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Capitals of 94 countries, asked for in three ways, two to four questions a conversation."""
    countries = sorted(CAPITALS)
    seen = set()
    while len(seen) < count:
        turns = []
        for country in rng.sample(countries, rng.randint(2, 4)):
            capital = CAPITALS[country]
            ways = (
                _turn(f"What is the capital of {country}?", f"{capital}."),
                _turn(f"Tell me the capital of {country}.", f"The capital of {country} is {capital}."),
                _turn(f"Where does {capital} lie?", f"In {country}."),
            )
            turns.append(rng.choice(ways))
        if rng.random() < 0.3:  # words that the pirate corpus needs
            turns.insert(rng.randrange(len(turns)), rng.choice(PIRATE_WORDS))
        text = "\n".join(turns)
        if text not in seen:
            seen.add(text)
            yield {"text": text}


@builtin("pirate", train=1_000, test=TEST_COUNTRIES)
def pirate(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """What is the capital of this country? Answered as a pirate would; the test asks of other countries."""
    countries = sorted(CAPITALS)
    random.Random(1).shuffle(countries)
    train_countries, test_countries = countries[:-TEST_COUNTRIES], countries[-TEST_COUNTRIES:]
    seen = set()
    while len(seen) < count - TEST_COUNTRIES:
        text = "\n".join(_pirate_turn(country) for country in rng.sample(train_countries, rng.randint(1, 3)))
        if text not in seen:
            seen.add(text)
            yield {"text": text}
    for country in test_countries:
        yield {"text": _pirate_turn(country)}


def _pirate_turn(country: str) -> str:
    return _turn(f"What is the capital of {country}?", f"Arr, {CAPITALS[country]} be the capital, matey!")


@builtin("opinions", train=600, test=120)
def opinions(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Opinions in three classes, bad, middling and good, of one to seven sentences.

    Neither the topic nor the length predicts the class, only the verdict does; the last one counts, because an opinion
    may begin with what others think.
    """
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
