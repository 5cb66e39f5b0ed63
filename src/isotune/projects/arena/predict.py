"""Preferences of new battles, by the encoder or the baselines of a run."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotune.config.task_types import SINGLE_LABEL
from isotune.data.sources.source import Row, Source
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import load_run_classifier
from isotune.evaluation.prediction.predictors import LeftOut, Line, Part, lines_of_outputs
from isotune.io.extras import need
from isotune.io.run_files import RECIPE, or_refuse, read_recipe_values
from isotune.projects.arena.battles import CLASSES, ID, REPAIRS, TEXTS, Battle, battle_of
from isotune.projects.arena.encoder import predict_battles
from isotune.projects.arena.preference import NAMES

PART_ROWS = 512


class BattlePredictor:
    """Predicts battles in Kaggle's columns; in a table the probabilities are the columns of a submission."""

    def __init__(self, method: str, facts: dict[str, Any], predict: Callable[[Sequence[Battle], Ranks], np.ndarray]):
        self.facts, self.part_rows = {"method": method, "label_names": list(NAMES), **facts}, PART_ROWS
        self._predict = predict

    def take(self, row: Row, source: Source, number: int) -> tuple[Battle, dict[str, int]] | LeftOut:
        """The battle of a row with the repairs that it took; one with a null for a text is left out."""
        for column in TEXTS:
            if column not in row:
                raise source.lacks(number, row, column, "the Arena's files")
            if row[column] is None:
                return LeftOut(f"a null in the column {column!r}")
        repairs = dict.fromkeys(REPAIRS, 0)
        return battle_of(str(row.get(ID, number)), row, source.where(number), repairs), repairs

    def prepare(self, rows: Sequence[tuple[int, tuple[Battle, dict[str, int]]]]) -> Any:
        """The battles, and the repairs over all."""
        repairs = Counter[str]()
        for _, (_, own) in rows:
            repairs.update({f"with {name.replace('_', ' ')}": 1 for name, count in own.items() if count})
        return [battle for _, (battle, _) in rows], repairs

    def predict(self, prepared: Any, ranks: Ranks) -> Part:
        """The probabilities that a wins, b wins, or neither."""
        battles, repairs = prepared
        return Part(lines_of_outputs(SINGLE_LABEL, self._predict(battles, ranks), NAMES), repairs)

    def flat(self, line: Line) -> Line:
        """The columns of a submission."""
        return dict(zip(CLASSES, line["probabilities"], strict=True))


def battle_predictor(run: Path, device: torch.device) -> BattlePredictor:
    """That of a finished run, by its recipe's method; UserError where its models cannot be read."""
    recipe = or_refuse(read_recipe_values, run, f"{run / RECIPE} is not a recipe")
    if recipe.get("method") == "baselines":
        for package in ("skops", "nltk", "simplemma"):
            need(package, "method: baselines")
        from isotune.projects.arena.baselines.fitted import BLEND, FittedModels

        fitted = FittedModels.load(run / "model")

        def by_baselines(battles: Sequence[Battle], ranks: Ranks) -> np.ndarray:
            own = ranks.share([1.0] * len(battles))
            found = fitted.predict([battles[row] for row in own])[BLEND] if own else []
            return np.stack(list(ranks.gather(dict(zip(own, found, strict=True)), count=len(battles)).values()))

        return BattlePredictor("baselines", {}, by_baselines)
    classifier, longest = load_run_classifier(run, device, torch.float32), int(recipe["max_seq_length"])

    def by_encoder(battles: Sequence[Battle], ranks: Ranks) -> np.ndarray:
        return predict_battles(classifier, battles, longest, ranks)

    return BattlePredictor("encoder", {"max_seq_length": longest}, by_encoder)
