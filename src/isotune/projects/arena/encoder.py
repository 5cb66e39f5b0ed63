"""The Arena's encoder: a battle as one document, each text within a fair share of the tokens, and its predictions.

[CLS] prompt [SEP] answer a [SEP] answer b [SEP]          id 30192/ab, class 0 where a wins
[CLS] prompt [SEP] answer b [SEP] answer a [SEP]          id 30192/ba, class 1 where a wins
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from isotune.data.classification.preparation import labels_table
from isotune.data.contents import COIN, HELD_OUT, hash_uniform
from isotune.data.documents import Documents, PreparedData, RunData, digest, starts_of
from isotune.data.packing import one_document_per_row
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.classification.evaluate import classify
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier, load_run_classifier
from isotune.evaluation.statistics.blending import normalize
from isotune.io.errors import UserError
from isotune.projects.arena.battles import CLASSES, SWAPPED_CLASSES, Battle, Battles, Competition
from isotune.projects.arena.preference import read_answers, write_preferences
from isotune.projects.arena.recipes import ArenaRecipe
from isotune.projects.arena.submission import write_submission

ENCODER, SUBMISSION = "encoder", "submission.csv"
ARENA_FORMAT_VERSION = 1  # raised when the same input gives other documents
PROMPT_SHARE = 4  # a quarter of the room is the prompt's where it needs it; each answer has three eighths
SMALLEST_ROOM = 8  # tokens: with fewer, a share could be empty
BATTLES_AT_ONCE = 1_000


@dataclass(frozen=True)
class BothOrders:
    """Each battle's two documents, the pair in an order that does not depend on which answer is called a."""

    documents: Documents  # the column `whole_lengths` is a document's tokens before anything was cut
    exchanged: np.ndarray  # bool [battles]; whether the first of the two has answer b before answer a
    identical: np.ndarray  # bool [battles]; whether both answers are the same tokens, and so the two documents

    def swap_average(self, probabilities: np.ndarray) -> np.ndarray:
        """The mean of the two predictions for each battle, of the documents' `probabilities`, float64 [2 * battles, 3].

        The same documents are predicted in the same places whichever answer is called a, and a sum of two numbers does
        not depend on their order: exchanging the answers exchanges the first two numbers, bit for bit.
        """
        first, second = probabilities[0::2], probabilities[1::2]
        # elsewhere in a microbatch the same document may round differently, which would tell the answers apart
        second = np.where(self.identical[:, None], first, second)
        swap = list(SWAPPED_CLASSES)
        as_called = np.where(self.exchanged[:, None], first[:, swap], first)
        the_other = np.where(self.exchanged[:, None], second, second[:, swap])
        return normalize((as_called + the_other) / 2)


def share_tokens(prompt: int, answer: int, other: int, room: int) -> tuple[int, int, int]:
    """How many of `room` tokens a prompt and two answers of so many tokens each get.

        room 16:    prompt 20, answers 20 and 20   ->  4, 6, 6
                    prompt 20, answers  2 and 20   ->  4, 2, 10      what one text leaves, another gets
                    prompt 20, answers  2 and  3   -> 11, 2, 3

    Exchanging the answers exchanges their shares. What is not empty keeps at least one token.
    """
    kept_prompt = min(prompt, max(room // PROMPT_SHARE, room - answer - other))
    left = room - kept_prompt
    if answer + other <= left:
        return kept_prompt, answer, other
    half = left // 2
    if answer <= half:
        return kept_prompt, answer, left - answer
    if other <= half:
        return kept_prompt, left - other, other
    return kept_prompt, half, half


def in_both_orders(battles: Sequence[Battle], encoder: TextEncoder, max_seq_length: int) -> BothOrders:
    """Two documents a battle, of class 0 without a label; UserError if max_seq_length has no room for three texts."""
    # between two texts stands the token that ends a text, or else the one that starts a text
    separator = encoder.suffix[-1:] if len(encoder.suffix) else encoder.prefix[:1]
    if not len(separator):
        raise UserError(
            f"the tokenizer {encoder.name} puts no special token around a text, and one has to stand between the "
            "prompt and the answers: choose an encoder's, such as BERT's"
        )
    special = encoder.special_tokens + 2 * len(separator)
    if max_seq_length < special + SMALLEST_ROOM:
        raise UserError(
            f"max_seq_length is {max_seq_length}: three texts need at least {special + SMALLEST_ROOM} tokens"
        )
    rows: list[tuple[np.ndarray, int, str, int]] = []
    exchanged, identical = [], []
    for battle, triple in zip(battles, _token_triples(battles, encoder), strict=True):
        of_prompt, of_a, of_b = map(len, triple)
        kept = share_tokens(of_prompt, of_a, of_b, max_seq_length - special)
        prompt, a, b = (_cut(tokens, count) for tokens, count in zip(triple, kept, strict=True))
        label = battle.label or 0
        orders = [("ab", label, (a, b)), ("ba", SWAPPED_CLASSES[label], (b, a))]
        exchanged.append(b.tobytes() < a.tobytes())
        identical.append(a.tobytes() == b.tobytes())
        for name, label_of_order, answers in reversed(orders) if exchanged[-1] else orders:
            pieces = [encoder.prefix, prompt, separator, answers[0], separator, answers[1], encoder.suffix]
            whole_length = special + of_prompt + of_a + of_b
            rows.append((np.concatenate(pieces), label_of_order, f"{battle.id}/{name}", whole_length))
    documents, labels, ids, whole_lengths = zip(*rows, strict=True)
    return BothOrders(
        Documents(
            input_ids=np.concatenate(documents),
            targets=np.array(labels, np.int32),
            starts=starts_of(np.array([len(tokens) for tokens in documents])),
            source_rows=np.repeat(np.arange(len(battles)), 2),
            columns={"ids": np.array(ids), "whole_lengths": np.array(whole_lengths, np.int64)},
        ),
        np.array(exchanged, bool),
        np.array(identical, bool),
    )


def prepare_competition(files: Competition, recipe: ArenaRecipe, tokenizer: Any) -> tuple[RunData, Battles]:
    """Documents to train on, in the orders that the recipe says, and those of prompts that are kept, in both.

    The labelled rows behind the latter are returned too. Raises UserError if max_seq_length leaves no room for three
    texts, or nothing is left on one side of the split.
    """
    encoder = TextEncoder(tokenizer)
    is_kept = kept_for_evaluation(files.train, recipe.seed, recipe.eval_split_share)
    if is_kept.all() or (recipe.eval_split_share and not is_kept.any()):
        side = "train on" if is_kept.all() else "evaluate on"
        raise UserError(
            f"eval_split_share is {recipe.eval_split_share:g}: of {files.train.name} nothing is left to {side}"
        )
    learned, kept = (files.train.subset(np.flatnonzero(rows).tolist()) for rows in (~is_kept, is_kept))
    evaluation = _prepare(kept, encoder, recipe, "both", {}) if len(kept) else None
    train = _prepare(learned, encoder, recipe, recipe.train_orders, {"held_out": len(kept)})
    return RunData(train, evaluation), kept


def kept_for_evaluation(battles: Battles, seed: int, share: float) -> np.ndarray:
    """Which battles a run does not train on, by their prompts: bool [battles]."""
    return hash_uniform(HELD_OUT, seed, _contents(battles)) < share


def predict_battles(
    classifier: Classifier, battles: Sequence[Battle], max_seq_length: int, ranks: Ranks | None = None
) -> np.ndarray:
    """Tokenize battles, and predict them as `predict_both_orders`."""
    return predict_both_orders(
        classifier, in_both_orders(battles, TextEncoder(classifier.tokenizer), max_seq_length), ranks
    )


def predict_both_orders(classifier: Classifier, both: BothOrders, ranks: Ranks | None = None) -> np.ndarray:
    """Mean probabilities of a, b and tie over both orders: float64 [battles, 3]; UserError if a logit is not finite.

    With `ranks` each process predicts its share, and gets all.
    """
    logits = classify(classifier, both.documents, ranks or Ranks(0, 1, classifier.device), progress=ranks is None)
    return both.swap_average(softmax(logits, axis=1))


def evaluate_encoder(
    run: Path, recipe: ArenaRecipe, files: Competition, held_out: Battles, device: torch.device
) -> None:
    """Write RUN/submission.csv with the saved model, and score `held_out` and, with their labels, the test rows."""
    classifier = load_run_classifier(run, device, torch.float32)
    test_probabilities = predict_battles(classifier, files.test.battles, recipe.max_seq_length)
    write_submission(run / SUBMISSION, [battle.id for battle in files.test.battles], test_probabilities, files.sample)
    print(f"submission  {run / SUBMISSION}: {len(files.test):,} rows")
    parts = [("arena", "train, kept for evaluation", held_out)] if len(held_out) else []
    if recipe.test_labels:
        parts.append(("arena_test", "test", read_answers(Path(recipe.test_labels), files.test)))
    for folder, split, battles in parts:
        is_test = split == "test"
        probabilities = (
            test_probabilities if is_test else predict_battles(classifier, battles.battles, recipe.max_seq_length)
        )
        facts = {"main": ENCODER, "model": str(run), "split": split}
        scores = write_preferences(run / "eval" / folder, battles, {ENCODER: probabilities}, **facts)
        print(f"{battles.name} ({split}): {len(battles):,} rows\n{scores.table()}")


def _prepare(
    battles: Battles, encoder: TextEncoder, recipe: ArenaRecipe, orders: str, remarks: dict[str, Any]
) -> PreparedData:
    both = in_both_orders(battles.battles, encoder, recipe.max_seq_length)
    documents = both.documents
    if orders == "one":
        second = hash_uniform(COIN, recipe.seed, _contents(battles, with_answers=True)) < 0.5
        documents = documents.select(2 * np.arange(len(battles)) + second)
    table = labels_table(
        battles.name,
        documents,
        max_seq_length=recipe.max_seq_length,
        overlong="prompt and answers",
        num_labels=len(CLASSES),
        class_names=CLASSES,
        **remarks,
    )
    texts = ["\n".join([*each.prompt, *each.answer_a, *each.answer_b]) for each in battles.battles]
    content = [documents.ids.tolist(), documents.labels.tolist(), texts]
    return PreparedData(
        documents=documents,
        rows=one_document_per_row(len(documents)),
        table=table,
        fingerprint=digest("arena", ARENA_FORMAT_VERSION, encoder.fingerprint, recipe.max_seq_length, *content),
        texts=lambda: (texts[row] for row in documents.source_rows.tolist()),
    )


def _token_triples(battles: Sequence[Battle], encoder: TextEncoder) -> Iterator[tuple[np.ndarray, ...]]:
    """The uncut tokens of each battle's prompt, answer a and answer b."""
    for start in range(0, len(battles), BATTLES_AT_ONCE):
        part = battles[start : start + BATTLES_AT_ONCE]
        columns = zip(*((battle.prompt, battle.answer_a, battle.answer_b) for battle in part), strict=True)
        yield from zip(*(encoder.tokens(["\n".join(turns) for turns in column]) for column in columns), strict=True)


def _cut(tokens: np.ndarray, kept: int) -> np.ndarray:
    """The first and the last tokens, half of `kept` each: both the start and the end of an answer matter."""
    if len(tokens) <= kept:
        return tokens
    return np.concatenate([tokens[: kept - kept // 2], tokens[len(tokens) - kept // 2 :]])


def _contents(battles: Battles, *, with_answers: bool = False) -> np.ndarray:
    digests = (digest(b.group(), *([b.answer_a, b.answer_b] if with_answers else [])) for b in battles.battles)
    return np.array([int(each[:16], 16) for each in digests], np.uint64)
