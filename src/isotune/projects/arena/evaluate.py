"""`isotune eval` of the Arena's encoder: the mean of both orders of the answers, scored and drawn as any classifier."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isotune.config.task_types import SINGLE_LABEL
from isotune.data.documents import Documents, digest
from isotune.data.tokenizer import TextEncoder
from isotune.evaluation.classification.evaluate import Evaluation, Rows
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.metrics.of_type import statistics_of
from isotune.evaluation.models import Classifier
from isotune.evaluation.statistics.resampling import by_group, score
from isotune.evaluation.tasks import ClassificationTask
from isotune.io.errors import UserError
from isotune.projects.arena.battles import Battles, read_battles, read_competition
from isotune.projects.arena.encoder import BothOrders, in_both_orders, kept_for_evaluation, predict_both_orders
from isotune.projects.arena.preference import GROUP_DIGITS, NAMES


@dataclass(frozen=True)
class BattleRows:
    """Labelled battles, and what of them a document, a result and its folder need."""

    both: BothOrders
    task: ClassificationTask
    name: str  # of the result's folder
    rows: Rows  # the document of each battle is that of the order in which it stands

    def evaluate(self, classifier: Classifier, ranks: Ranks, *, resamples: int, seed: int) -> Evaluation | None:
        """Predict all battles, and score them on the main process; intervals resample prompts. None on the others."""
        outputs = predict_both_orders(classifier, self.both, ranks)
        if not ranks.is_main:
            return None
        groups = np.unique(self.rows.documents.columns["group"], return_inverse=True)[1]
        statistics = statistics_of(SINGLE_LABEL, self.rows.labels, outputs, names=NAMES)
        scores = score(
            [by_group(statistic, groups) for statistic in statistics],
            int(groups.max()) + 1,
            resamples=resamples,
            seed=seed,
        )
        return Evaluation(self.rows, outputs, scores)


def battle_rows(classifier: Classifier, dataset_name: str | None, limit: int | None) -> BattleRows:
    """The first `limit` battles of a labelled file, by default those of its training file that the run kept.

    UserError where the run kept none, or the file is no file of labelled battles.
    """
    assert classifier.run is not None
    recipe = classifier.run.settings
    if dataset_name is None:
        train = read_competition(Path(recipe["dataset_name"])).train
        kept = np.flatnonzero(kept_for_evaluation(train, recipe["seed"], recipe["eval_split_share"])).tolist()
        if not kept:
            raise UserError(f"{classifier.name} kept no rows for evaluation: name a file of battles by --dataset_name")
        battles, split, name = train.subset(kept), "train, kept for evaluation", f"{Path(train.name).stem}-kept"
    else:
        if not Path(dataset_name).is_file():
            raise UserError(f"--dataset_name {dataset_name} is no file: an Arena run is evaluated on labelled battles")
        battles, split, name = read_battles(Path(dataset_name), labelled=True), "test", Path(dataset_name).stem
    battles = battles.subset(range(len(battles))[:limit])
    longest = int(recipe["max_seq_length"])
    both = in_both_orders(battles.battles, TextEncoder(classifier.tokenizer), longest)
    given = np.array([not str(own_id).endswith("/ba") for own_id in both.documents.ids])
    documents = _of_battles(both.documents.select(given), battles)
    texts = ["\n".join([*b.prompt, *b.answer_a, *b.answer_b]) for b in battles.battles]
    rows = Rows(
        documents=documents,
        texts=texts,
        names=list(NAMES),
        named=True,
        truncated=int((documents.columns["whole_lengths"] > longest).sum()),
        fingerprint=digest("battles", longest, documents.ids.tolist(), documents.labels.tolist(), texts),
        left_out={"rows_read": len(battles), "reasons": {}},
    )
    return BattleRows(both, ClassificationTask(dataset_name=battles.name, dataset_split=split), name, rows)


def _of_battles(documents: Documents, battles: Battles) -> Documents:
    """Documents, one a battle in their order, that are named as their battles are, with the prompt's group."""
    columns = {
        **documents.columns,
        "ids": np.array([battle.id for battle in battles.battles]),
        "group": np.array([battle.group()[:GROUP_DIGITS] for battle in battles.battles]),
    }
    return Documents(documents.input_ids, documents.targets, documents.starts, documents.source_rows, columns)
