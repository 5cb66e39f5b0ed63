"""Which words of a text a prediction comes from, by integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365).

The embeddings of a text are moved in a straight line from those of a blank text, in which every token but the special
ones is the padding token. What each token adds to the output on the way, summed over its embedding, is its share. All
shares add up to the difference of the output between the two texts; what is missing to that is told.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from isotune.compat.peft import base_model_of
from isotune.config.task_types import MULTI_LABEL, REGRESSION
from isotune.data.documents import FIRST_TYPE, Documents
from isotune.evaluation.classification.attention_plots import words_of
from isotune.evaluation.models import Classifier
from isotune.models.classifier import takes_token_types
from isotune.models.layouts.layout import padding_token
from isotune.serving.limits import FAILED, Refused

METHOD = "integrated gradients"
STEPS = 32  # nodes of Gauss and Legendre's rule, exact for polynomials up to degree 63
FORWARD_TOKENS = 4_096  # of one forward and backward; a longer text runs alone


@dataclass(frozen=True)
class Attribution:
    """The words of a text, and what each of them adds to an output."""

    words: list[str]  # special tokens are left out
    shares: list[float]  # of each word, in units of the output
    output: float  # a probability, or a regression's number
    blank_output: float  # of the blank text
    rest: float  # what the shares, special tokens included, lack of the difference of the two


def integrated_gradients(classifier: Classifier, documents: Documents, output: int, steps: int = STEPS) -> Attribution:
    """The shares of the words of one document in the probability of one class or label, or in the number.

    Refused where the model does not compute its output from one embedding of each token.
    """
    model, tokenizer = base_model_of(classifier.model), classifier.tokenizer
    ids = torch.from_numpy(documents.input_ids.astype(np.int64)).to(classifier.device)
    special_ids = set(tokenizer.all_special_ids)
    special = torch.tensor([token in special_ids for token in ids.tolist()], device=ids.device)
    blank = torch.where(special, ids, _blank_token(tokenizer))
    inputs = {"attention_mask": torch.ones_like(ids)}
    if FIRST_TYPE in documents.columns and takes_token_types(model):
        first = int(documents.columns[FIRST_TYPE][0])
        inputs["token_type_ids"] = (torch.arange(len(ids), device=ids.device) >= first).long()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        end, start = embedding(ids[None])[0], embedding(blank[None])[0]
    nodes, weights = (torch.tensor(values, dtype=end.dtype) for values in np.polynomial.legendre.leggauss(steps))
    gradient = torch.zeros_like(end)
    chunk = max(1, FORWARD_TOKENS // len(ids))
    for places, shares in zip(nodes.split(chunk), weights.split(chunk), strict=True):
        way = ((places + 1) / 2)[:, None, None].to(end.device)
        points = (start + way * (end - start)).requires_grad_()
        value = _output(classifier, model, embedding, points, ids, inputs, output)
        try:
            (slope,) = torch.autograd.grad(value.sum(), points)
        except RuntimeError as error:
            what = "its output is not computed from one embedding of each token"
            raise Refused(FAILED, "no_attribution", f"the words of this model have no shares: {what}") from error
        gradient += (shares[:, None, None].to(end.device) / 2 * slope).sum(0)
    tokens = ((end - start) * gradient).sum(-1).double().cpu().numpy()
    with torch.no_grad():
        ends = _output(classifier, model, embedding, torch.stack([start, end]), ids, inputs, output).tolist()
    words, word_of = words_of(tokenizer, ids.tolist())
    of_words = np.bincount(word_of, tokens, len(words))
    own = np.bincount(word_of, (~special).cpu().numpy(), len(words)) > 0
    kept = [number for number in range(len(words)) if own[number]]
    rest = float(ends[1] - ends[0] - tokens.sum())
    return Attribution([words[n] for n in kept], [float(of_words[n]) for n in kept], ends[1], ends[0], rest)


def _blank_token(tokenizer: Any) -> int:
    """The token of a blank text: the one that pads, else another that says nothing."""
    known = (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def _output(
    classifier: Classifier,
    model: Any,
    embedding: nn.Module,
    points: torch.Tensor,
    ids: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    output: int,
) -> torch.Tensor:
    """The output for embeddings [points, tokens, size] in the place of those of `ids`: float [points]."""
    count = len(points)
    hook = embedding.register_forward_hook(lambda module, arguments, found: points)
    try:
        repeated = {name: values.expand(count, -1) for name, values in inputs.items()}
        with padding_token(model.config.get_text_config()):  # a decoder's head takes no batch without one
            logits = model.stock_forward(input_ids=ids.expand(count, -1), **repeated).logits.float()
    finally:
        hook.remove()
    if classifier.task_type == REGRESSION:
        return logits[:, output]
    return (logits.sigmoid() if classifier.task_type == MULTI_LABEL else logits.softmax(-1))[:, output]
