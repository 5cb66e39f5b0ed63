"""The label thresholds of a finished run: of its recipe, or chosen with its saved model; kept beside the weights."""

from pathlib import Path

import numpy as np
import torch

from isotune.config import ClassificationRecipe
from isotune.data.classification.thresholds import CHOSEN, choose_thresholds, thresholds_of, write_thresholds
from isotune.data.documents import RunData
from isotune.evaluation.classification.evaluate import classify, outputs_of
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import load_run_classifier


def keep_thresholds(run: Path, recipe: ClassificationRecipe, data: RunData, device: torch.device) -> str:
    """Write RUN/model/label_thresholds.json; the line that says them. UserError where the model cannot be opened."""
    labels = data.train.num_labels or 0
    names = data.train.class_names or list(map(str, range(labels)))
    chosen = data.to_choose_on
    if recipe.label_thresholds == CHOSEN:
        assert chosen is not None, "texts are kept back where thresholds are to be chosen"
        classifier = load_run_classifier(run, device, torch.float32)
        logits = classify(classifier, chosen.documents, Ranks(0, 1, device))
        probabilities = outputs_of(classifier.task_type, logits)
        thresholds = choose_thresholds(np.asarray(chosen.documents.labels), probabilities)
    else:
        thresholds = thresholds_of(recipe.label_thresholds, labels)
    texts = None if chosen is None else len(chosen.documents)
    write_thresholds(run / "model", thresholds, names, texts)
    told = ", ".join(
        f"{name} {value:.3g}" for name, value in zip(names, np.broadcast_to(thresholds, labels), strict=True)
    )
    return told if texts is None else f"{told}; of the best F1 on {texts:,} texts that were kept back"
