"""Fitted baselines, and the files that keep them: RUN/model/*.skops, which are read without running what they say.

skops writes what scikit-learn's estimators hold as JSON and arrays. Reading makes objects of the types that skops knows
and of those listed here, and of nothing else; a pickle could run any code.
"""

import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import sklearn
import skops.io
from sklearn.calibration import CalibratedClassifierCV
from threadpoolctl import threadpool_limits

from isotune.evaluation.statistics.blending import blend
from isotune.io.errors import UserError, first_line
from isotune.io.files import replace_file, replacing
from isotune.io.reading import read_json_object
from isotune.projects.arena.baselines.estimators import MEMBERS, FeatureMatrix, SwapAveraged, battle_features
from isotune.projects.arena.battles import Battle

BLEND, PRIOR = "blend", "class_prior"
WEIGHTS, FEATURES, SKOPS = "blend.json", "features", ".skops"
TRUSTED = [  # private parts of the estimators, which skops does not know by itself; each is plain numbers
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.tree._tree.Tree",
]


@dataclass(frozen=True)
class FittedModels:
    """Models that are fitted on the same rows, with their weights in the blend, by name."""

    matrix: FeatureMatrix
    models: dict[str, SwapAveraged]
    weights: dict[str, float]
    prior: np.ndarray  # of the classes: float64 [3]

    def predict(self, battles: Sequence[Battle]) -> dict[str, np.ndarray]:
        """Probabilities by model, with PRIOR and BLEND: float64 [rows, 3] each; a row's do not depend on other rows."""
        inputs = self.matrix.transform(battle_features(battles))
        with threadpool_limits(1):
            predictions = {name: model.predict(*inputs) for name, model in self.models.items()}
        mixed = blend(list(predictions.values()), np.array([self.weights[name] for name in predictions]))
        return {PRIOR: np.tile(self.prior, (len(battles), 1)), **predictions, BLEND: mixed}

    def save(self, folder: Path) -> None:
        """Write one file of features, one for each model, and the weights, which are last."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {FEATURES: self.matrix.parts, **{n: m.model for n, m in self.models.items()}}.items():
            with replacing(folder / f"{name}{SKOPS}") as unfinished:
                skops.io.dump(content, unfinished, compression=zipfile.ZIP_DEFLATED)
        facts = {"weights": self.weights, "prior": self.prior.tolist(), "scikit_learn": sklearn.__version__}
        replace_file(folder / WEIGHTS, json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote; UserError where a file is missing, broken, or holds what is not trusted."""
        try:
            facts = read_json_object(folder / WEIGHTS)
            weights, prior = {str(name): float(w) for name, w in facts["weights"].items()}, np.array(facts["prior"])
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no {WEIGHTS}: the run has not finished, or is of a version that kept no models"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{folder / WEIGHTS} cannot be read: {first_line(error)}") from None
        if unknown := next((name for name in weights if name not in MEMBERS), None):
            raise UserError(f"{folder / WEIGHTS} names the model {unknown!r}; there are {', '.join(MEMBERS)}")
        if (own := facts.get("scikit_learn")) != sklearn.__version__:
            print(f"note: fitted by scikit-learn {own}, and this is {sklearn.__version__}", file=sys.stderr)
        matrix = _read(folder / f"{FEATURES}{SKOPS}", dict)
        models = {
            name: SwapAveraged.of_fitted(
                name, _read(folder / f"{name}{SKOPS}", MEMBERS[name].estimator_class, CalibratedClassifierCV)
            )
            for name in weights
        }
        return cls(FeatureMatrix.of_parts(matrix), models, weights, prior)


def _read(file: Path, *kinds: Any) -> Any:
    """What a file holds, of one of `kinds`; UserError where its types are not trusted, before anything is made."""
    try:
        others = sorted(set(skops.io.get_untrusted_types(file=file)) - set(TRUSTED))
        if not others:
            content = skops.io.load(file, trusted=TRUSTED)
            if isinstance(content, kinds):
                return content
            others = [type(content).__name__]
    except FileNotFoundError:
        raise UserError(f"there is no file {file}: the run's models are not whole") from None
    except Exception as error:  # skops raises whatever a broken archive makes of its readers
        raise UserError(f"{file} cannot be read: {first_line(error)}") from None
    raise UserError(f"{file} holds {', '.join(others)}, which no baseline is made of: nothing of it was loaded")
