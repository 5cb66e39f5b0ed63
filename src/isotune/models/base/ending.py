"""Where generation with a saved model ends: where the answers of its training did, whatever its base ended at."""

from typing import Any

from isotune.data.sft.tokenization import ConversationEncoder
from isotune.io.errors import UserError


def eos_ids_of(model: Any, encoder: ConversationEncoder) -> set[int]:
    """Every token that ends an answer: the tokenizer's eos, a chat template's own, those of generation_config.json."""
    named = model.generation_config.eos_token_id
    ids = ({*(named if isinstance(named, list) else [named]), encoder.eos_token_id} | encoder.end_ids) - {None}
    if other := [token for token in ids if type(token) is not int]:
        raise UserError(
            f"eos_token_id of {model.name_or_path}/generation_config.json holds {other[0]!r}: write the numbers of "
            "tokens"
        )
    return ids


def end_generation(model: Any, tokenizer: Any) -> None:
    """Let whoever generates with the saved model stop where an answer of its training ends."""
    settings, encoder = model.generation_config, ConversationEncoder(tokenizer)
    named = settings.eos_token_id
    known = named if isinstance(named, list) else [] if named is None else [named]
    if missing := eos_ids_of(model, encoder) - set(known):
        settings.eos_token_id = [*known, *sorted(missing)]
