"""An ensemble behind the queue: each member reads a text as its run does, and what they say is blended."""

from collections.abc import Callable, Sequence

import numpy as np

from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.models import Classifier
from isotune.evaluation.prediction.ensembles import EnsemblePredictor, SavedEnsemble, open_ensemble
from isotune.io.errors import UserError
from isotune.serving.classification.attribution import Attribution, integrated_gradients
from isotune.serving.classification.service import OfModels, Outputs, TextService
from isotune.serving.limits import FAILED, Refused


class EnsembleService(TextService):
    """The members of an ensemble, and their weighted mean."""

    def __init__(self, predictor: EnsemblePredictor) -> None:
        saved, members = predictor.saved, [member.classifier for member in predictor.members]
        pairs = {classifier.settings.dataset_text_pair_field is not None for classifier in members}
        if len(pairs) > 1:
            raise UserError(f"some members of {saved.folder} read one text and others two: they cannot be served")
        names = [str(name) for name in saved.label_names or range(members[0].num_labels)]
        super().__init__(
            Outputs(saved.task_type, names, saved.thresholds),
            is_pair=pairs.pop(),
            max_seq_length=min(classifier.settings.max_seq_length for classifier in members),
            device_type=members[0].device.type,
        )
        self.predictor, self.members = predictor, members
        self._ranks = Ranks(0, 1, members[0].device)

    def documents(self, of_each: Sequence[Sequence[str]]) -> OfModels:
        """The texts as each member reads them."""
        return tuple(member.reader.documents(of_each) for member in self.predictor.members)

    def outputs(self, documents: OfModels) -> np.ndarray:
        """The blend of what they say, in the order of the ensemble's classes."""
        return self.predictor.outputs(documents, self._ranks)

    def explain(self, documents: OfModels, output: int) -> Attribution:
        """The weighted mean of the members' shares, where they read the same words: those of the blend, exactly."""
        found = list[Attribution]()
        for classifier, own, order in zip(self.members, documents, self.predictor.orders, strict=True):
            found.append(integrated_gradients(classifier, own, output if order is None else order[output]))
        if any(one.words != found[0].words for one in found):
            raise Refused(FAILED, "no_attribution", "the members cut this text into other words: ask one of them alone")
        weights = self.predictor.saved.weights
        shares = weights @ np.array([one.shares for one in found]).reshape(len(found), -1)
        ends = weights @ np.array([[one.output, one.blank_output, one.rest] for one in found])
        return Attribution(found[0].words, shares.tolist(), *ends.tolist())


def open_service(saved: SavedEnsemble, load: Callable[[str], Classifier]) -> EnsembleService:
    """The service of an ensemble whose members `load` opens by the folders of their runs."""
    return EnsembleService(open_ensemble(saved, load))
