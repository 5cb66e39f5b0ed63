"""The feature vector of a battle, from the two answers, their similarity and the prompt:

    [ answer a - answer b | answer a + answer b | pair | prompt ]

The first two parts hold the 50 or so numbers of `answer_features`. Exchanging the answers flips the sign of the first
part and changes no other number. Words come from NLTK's RegexpTokenizer, which needs no data, stop words from
scikit-learn, lemmas from simplemma: nothing is downloaded.
"""

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from math import log1p

import numpy as np
import simplemma
from nltk.tokenize import RegexpTokenizer
from nltk.util import ngrams
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

# each Chinese or Japanese character counts as a word: these texts have no spaces to split at
IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff"
WORDS = RegexpTokenizer(rf"[{IDEOGRAPH}]|[^\W_{IDEOGRAPH}]+(?:['’][^\W\d_]+)?")
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SCRIPTS = ((0x0000, 0x024F), (0x0400, 0x052F), (0x3040, 0xD7AF))  # Latin, Cyrillic, Chinese-Japanese-Korean, others
MIN_ZLIB_BYTES = 30  # zlib's own header would dominate shorter texts
LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])\s+", re.M)
CODE_BLOCK = re.compile(r"```|^(?: {4}|\t)\S", re.M)
CODE_LINE = re.compile(r"[{};]\s*$|^[ \t]*(?:def |class |import |for \(|if \(|return |print\()", re.M)
FORM = {  # counted in an answer, as those of MANNER are
    "list_items": LIST_ITEM,
    "numbered_items": re.compile(r"^[ \t]*\d+[.)]\s+", re.M),
    "headings": re.compile(r"^[ \t]*#{1,6} |^[ \t]*\*\*[^*]+\*\*:?\s*$", re.M),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
    "code_blocks": CODE_BLOCK,
    "code_lines": CODE_LINE,
    "links": re.compile(r"https?://|www\."),
}
REFUSAL = re.compile(
    r"\bas an ai\b|\bas a (?:large )?language model|\bi(?:'m| am) (?:sorry|unable|not able)|"
    r"\bi (?:cannot|can't|can not|won't|do not have|don't have|don't know)\b|\bi apologi[sz]e|"
    r"\bcannot (?:provide|fulfill|assist)|\bnot appropriate\b",
    re.I,
)
MANNER = {
    "refusals": REFUSAL,
    "hedges": re.compile(r"\b(?:may|might|could|perhaps|possibly|probably|seems|generally|typically|depends?)\b", re.I),
    "reasoning": re.compile(
        r"\b(?:because|therefore|since|thus|hence|for example|for instance|such as|however)\b", re.I
    ),
    "first_person": re.compile(r"\b(?:i|i'm|my|me)\b", re.I),
    "second_person": re.compile(r"\b(?:you|your)\b", re.I),
    "leftover_turns": re.compile(r"^[ \t]*(?:human|user|assistant|question)\s*:|<\||</s>|\[/?INST|###", re.I | re.M),
}
PARAGRAPH_GAP = re.compile(r"\n\s*\n")
APOLOGY = re.compile(r"\bsorry\b|\bapolog", re.I)
OFFER = re.compile(r"let me know|hope this helps|feel free|anything else|happy to help", re.I)
COURTESY = re.compile(r"^\s*(?:sure|certainly|of course|yes|no|great|thank|here (?:is|are)|here's|hello|hi)\b", re.I)
FINAL_MARKS, CLOSING_MARKS = ".!?。！？", "\"')`*:;]}"
OPENING_CHARACTERS = 150  # of an answer: a refusal in them is not a quotation
MIN_SENTENCE_CHARACTERS = 9  # shorter lines may be repeated for good reasons
ASKS = {
    "summary": r"summar|tl;?dr|\btitle\b|shorten|\bbrief|concise",
    "writing": r"\bwrite|compose|draft|poem|story|essay|email|letter",
    "fact": r"\bwhat\b|\bwho\b|\bwhen\b|\bwhere\b|\bwhich\b",
    "reason": r"\bwhy\b|\bhow\b|\bexplain",
    "list": r"\blist\b|suggest|ideas|come up|brainstorm|recommend",
    "rewriting": r"rewrite|paraphrase|translate|correct|\bedit|convert",
    "label": r"classif|identify|extract|categor|sentiment",
    "role": r"\byou are\b|pretend|act as|imagine",
    "person": r"\bdo you\b|\bare you\b|\byour\b",
}


@lru_cache(maxsize=200_000)
def lemma(word: str) -> str:
    """The English lemma of a lower-case word; words of other languages mostly stay unchanged."""
    return simplemma.lemmatize(word, lang="en").lower()


class Text:
    """A text, its words in lower case, their lemmas in order, and what is counted of them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = tuple(WORDS.tokenize(text.lower()))
        self.lemmas = tuple(lemma(word) for word in self.words)
        self.content = tuple(  # the lemmas in order, without stop words
            lemma
            for lemma, word in zip(self.lemmas, self.words, strict=True)
            if lemma not in ENGLISH_STOP_WORDS and word not in ENGLISH_STOP_WORDS
        )
        self.content_set = frozenset(self.content)
        self.bigrams = frozenset(ngrams(self.lemmas, 2))
        self.trigrams = tuple(ngrams(self.lemmas, 3))
        self.numbers = frozenset(NUMBER.findall(text))  # in digits
        self.sentences = tuple(piece.strip() for piece in SENTENCE_END.split(text) if piece.strip())
        points = np.array([ord(character) for character in text if character.isalpha()], np.int64)
        counts = [int(((points >= low) & (points <= high)).sum()) for low, high in SCRIPTS]
        # shares of the letters in each of SCRIPTS and in others: float64 [4], zeros without letters
        self.scripts = np.array([*counts, len(points) - sum(counts)]) / max(len(points), 1)


def answer_features(answer: Text, prompt: Text) -> dict[str, float]:
    """The features of one answer to a prompt. Counts and lengths are log(1 + n)."""
    text, stripped, size, raw = answer.text, answer.text.strip(), max(len(answer.text), 1), answer.text.encode()
    words, sentences = len(answer.words), len(answer.sentences)
    long_sentences = [each for each in answer.sentences if len(each) >= MIN_SENTENCE_CHARACTERS]
    prompt_trigrams = frozenset(prompt.trigrams)
    return {
        # size
        "characters": log1p(len(text)),
        "words": log1p(words),
        "sentences": log1p(sentences),
        "lines": log1p(stripped.count("\n")),
        "paragraphs": log1p(len(PARAGRAPH_GAP.findall(stripped))),
        "characters_a_word": sum(map(len, answer.words)) / max(words, 1),
        "words_a_sentence": log1p(words / max(sentences, 1)),
        "empty": float(not stripped),
        # form
        **_counts(text, FORM),
        "question_marks": log1p(text.count("?")),
        "exclamation_marks": log1p(text.count("!")),
        "capitals_share": sum(map(str.isupper, text)) / size,
        "digits_share": sum(map(str.isdigit, text)) / size,
        "marks_share": sum(not each.isalnum() and not each.isspace() for each in text) / size,
        "ends_a_sentence": float(stripped[-1:] in tuple(FINAL_MARKS)),
        "ends_with_a_mark": float(stripped[-1:] in tuple(FINAL_MARKS + CLOSING_MARKS)),
        "begins_with_space": float(text[:1].isspace()),
        "begins_small": float(stripped[:1].islower()),
        "begins_quoted": float(stripped[:1] in ('"', "'", "“")),
        # manner
        **_counts(text, MANNER),
        "begins_with_refusal": float(bool(REFUSAL.search(text[:OPENING_CHARACTERS]))),
        "apologises": float(bool(APOLOGY.search(text))),
        "offers_more": float(bool(OFFER.search(text))),
        "begins_with_courtesy": float(bool(COURTESY.search(text))),
        # repetition
        "different_lemmas_share": len(set(answer.lemmas)) / max(len(answer.lemmas), 1),
        "content_share": len(answer.content) / max(words, 1),
        "repeated_triples_share": _repeated(answer.trigrams),
        "repeated_sentences_share": _repeated(long_sentences),
        "zipped_share": len(zlib.compress(raw)) / max(len(raw), MIN_ZLIB_BYTES),
        # relation to the prompt
        "prompt_covered": _share(answer.content_set & prompt.content_set, prompt.content_set),
        "words_from_prompt": _share(answer.content_set & prompt.content_set, answer.content_set),
        "new_words": log1p(len(answer.content_set - prompt.content_set)),
        "prompt_pairs_covered": _share(answer.bigrams & prompt.bigrams, prompt.bigrams),
        "pairs_from_prompt": _share(answer.bigrams & prompt.bigrams, answer.bigrams),
        "triples_from_prompt": sum(each in prompt_trigrams for each in answer.trigrams) / max(len(answer.trigrams), 1),
        "prompt_numbers_covered": _share(answer.numbers & prompt.numbers, prompt.numbers),
        "numbers": log1p(len(answer.numbers)),
        "new_numbers": log1p(len(answer.numbers - prompt.numbers)),
        "length_to_prompt": log1p(len(text)) - log1p(len(prompt.text)),
        "same_script": float(np.minimum(answer.scripts, prompt.scripts).sum()),
        "other_than_latin": 1.0 - float(answer.scripts[0]),
    }


def pair_features(one: Text, other: Text) -> dict[str, float]:
    """The similarity of two answers, the same in either order."""
    common = len(one.content_set & other.content_set)
    beginning = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one.lemmas, other.lemmas, strict=False)))
    lengths = sorted((len(one.text), len(other.text)))
    return {
        "identical": float(one.text.strip() == other.text.strip()),
        "common_words": _share_of_union(one.content_set, other.content_set),
        "common_words_of_shorter": common / max(min(len(one.content_set), len(other.content_set)), 1),
        "common_pairs": _share_of_union(one.bigrams, other.bigrams),
        "common_numbers": _share_of_union(one.numbers, other.numbers),
        "common_beginning": log1p(beginning),
        "shorter": log1p(lengths[0]),
        "longer": log1p(lengths[1]),
    }


def prompt_features(prompt: Text) -> dict[str, float]:
    """The features of the prompt."""
    text, small = prompt.text, prompt.text.lower()
    return {
        "characters": log1p(len(text)),
        "words": log1p(len(prompt.words)),
        "lines": log1p(text.count("\n")),
        "empty": float(not text.strip()),
        "numbers": log1p(len(prompt.numbers)),
        "list_items": log1p(len(LIST_ITEM.findall(text))),
        "code": float(bool(CODE_BLOCK.search(text) or CODE_LINE.search(text))),
        "question_mark": float("?" in text),
        "ends_with_question_mark": float(text.strip().endswith("?")),
        "other_than_latin": 1.0 - float(prompt.scripts[0]) if text.strip() else 0.0,
        **{f"asks_{name}": float(bool(re.search(pattern, small))) for name, pattern in ASKS.items()},
    }


def features(prompt: Text, answer_a: Text, answer_b: Text, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a battle and of the battle with exchanged answers: float64 [features] each."""
    a, b = (np.array(list(answer_features(each, prompt).values())) for each in (answer_a, answer_b))
    rest = [*pair_features(answer_a, answer_b).values(), *prompt_features(prompt).values(), log1p(turns)]
    return np.concatenate([a - b, a + b, rest]), np.concatenate([b - a, b + a, rest])


def _counts(text: str, patterns: dict[str, re.Pattern[str]]) -> dict[str, float]:
    return {name: log1p(len(pattern.findall(text))) for name, pattern in patterns.items()}


def _repeated(items: Sequence[object]) -> float:
    return 1.0 - len(set(items)) / len(items) if items else 0.0


def _share(part: frozenset, whole: frozenset) -> float:
    return len(part) / max(len(whole), 1)


def _share_of_union(one: frozenset, other: frozenset) -> float:
    return len(one & other) / max(len(one | other), 1)
