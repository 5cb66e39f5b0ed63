"""Which prompts may be generated from together: measured once for each model.

A batch is filled up on the left, and the attention mask says so. Some models read what fills it all the same
(RecurrentGemma's convolution), and RWKV of transformers 5.23 mixes the rows of a batch when it goes on by a token.
"""

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from isotune.evaluation.generation.base_rules import without_base_rules
from isotune.evaluation.models import GenerationModel
from isotune.io.errors import is_first_process
from isotune.models.isolation import ALONE_TOLERANCE, random_documents
from isotune.models.log_control import quiet_libraries

ANY, ONE_LENGTH, ALONE = "any", "of one length", "alone"
SHORT, LONG = 4, 11  # tokens; few beside those that fill, so that a trace of these shows

_measured: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def together(lm: GenerationModel, lengths: Sequence[int]) -> list[int]:
    """A number for each prompt, of so many tokens: those of one number may be a batch. A line where not all may.

    Every rank of a sharded model calls it with the same lengths.
    """
    if len(lengths) < 2:
        return [0] * len(lengths)
    if lm.model not in _measured:
        with quiet_libraries(), without_base_rules(lm.model):
            _measured[lm.model] = found = _measure(lm)
        if found != ANY and is_first_process():
            which = (
                "prompts of one length are a batch" if found == ONE_LENGTH else "each prompt is generated from alone"
            )
            kind = lm.model.config.model_type
            print(f"note        {which}: rows of a batch change each other in model type '{kind}'", file=sys.stderr)
    found = _measured[lm.model]
    return [0] * len(lengths) if found == ANY else list(lengths if found == ONE_LENGTH else range(len(lengths)))


def _measure(lm: GenerationModel) -> str:
    vocabulary, filler = lm.model.config.get_text_config().vocab_size, min(lm.eos_ids)
    draw = torch.Generator().manual_seed(0)
    own, other, longer = random_documents(vocabulary, (SHORT, SHORT, LONG), draw)
    filled = torch.cat([torch.full((LONG - SHORT,), filler), own])
    expected = _logits(lm, [own], SHORT, filler)
    for rows, found in (([filled, longer], ANY), ([own, other], ONE_LENGTH)):
        logits = _logits(lm, rows, SHORT, filler)
        if not expected or not logits:
            continue
        same = int(logits[0].argmax()) == int(expected[0].argmax())  # else the second steps are of different texts
        pairs = list(zip(logits, expected, strict=False))[: 2 if same else 1]
        error = max(float((a - b).abs().max()) for a, b in pairs)
        if error <= ALONE_TOLERANCE.get(lm.model.dtype, 1e-4) * float(expected[0].abs().max()):
            return found
    return ALONE


def _logits(lm: GenerationModel, rows: list[torch.Tensor], tokens: int, filler: int) -> list[torch.Tensor]:
    """Of the first new token of the first row, whose last `tokens` are its own, and of the next: [vocabulary] each.

    Empty where the model stops.
    """
    ids = torch.stack(rows)
    mask = torch.ones_like(ids)
    mask[0, :-tokens] = 0
    try:
        with torch.no_grad():
            found = lm.model.generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                do_sample=False,
                max_new_tokens=2,
                pad_token_id=filler,
                output_logits=True,
                return_dict_in_generate=True,
                synced_gpus=lm.is_sharded,
            )
    except Exception:  # of whatever a model does with a batch; alone it says so itself
        return []
    return [step[0].float().cpu() for step in found.logits]
