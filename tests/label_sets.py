"""Data sets made by code with known answers: pairs, numbers and sets of labels, and tokenizers that know pairs."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from isotune.models.base.builtin import builtin_tokenizer
from tests.building import small_encoder

TOPICS = {"sea": "waves", "bread": "flour", "chess": "queen", "rain": "cloud"}
FILLER = ("the", "old", "man", "said", "that", "we", "saw", "it", "again", "today")


def rows_of(task_type: str, count: int, seed: int = 0, *, pairs: bool = True) -> list[dict[str, Any]]:
    """Rows whose label follows from the words of their text, or of both.

    single_label: whether the second text names what the first is about; regression: how many topics both name, and a
    tenth for each word of the second; multi_label: the topics that are named.
    """
    draw = random.Random(f"{task_type} {seed}")
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        first, second = ({topic for topic in TOPICS if draw.random() < 0.4} for _ in range(2))
        texts = [_text(draw, first, 0), _text(draw, second, 1)]
        named = sorted(first | second if pairs else first)
        label: Any = named
        if task_type == "single_label":
            label = int(bool(first & second))
        elif task_type == "regression":
            label = len(first & second if pairs else first) + len(texts[pairs].split()) / 10
        rows.append({"sentence1": texts[0], "sentence2": texts[1], "label": label} if pairs else
                    {"text": texts[0], "label": label})  # fmt: skip
    return rows


def _text(draw: random.Random, topics: set[str], side: int) -> str:
    words = [draw.choice(FILLER) for _ in range(draw.randint(2, 12))]
    for topic in sorted(topics):
        words.insert(draw.randint(0, len(words)), (topic, TOPICS[topic])[side])
    return " ".join(words)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The built-in tokenizer with a form for two texts: BERT's, with token types, or RoBERTa's, without."""
    tokenizer: Any = builtin_tokenizer("builtin:bert-tiny")
    types = kind not in ("roberta", "distilbert")
    pair = "<s> $A </s> $B:1 </s>:1" if types else "<s> $A </s> </s> $B </s>"
    special = [("<s>", 0), ("</s>", 2)]
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", cls_token="<s>",
                                   sep_token="</s>", unk_token="<unk>", model_max_length=512)  # fmt: skip
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=special
    )
    made.model_input_names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return made


def pair_encoder(folder: Path, kind: str, **config: Any) -> str:
    """`small_encoder` with a tokenizer that knows pairs."""
    small_encoder(folder, kind, **config)
    pair_tokenizer(kind).save_pretrained(folder)
    return str(folder)
