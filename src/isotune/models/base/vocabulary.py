"""Whether a tokenizer's tokens have rows in the embedding of the model that they are for."""

from typing import Any

from isotune.io.errors import UserError


def token_count(tokenizer: Any) -> int:
    """The rows that an embedding needs for the tokenizer: its highest token id and one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def embedding_rows(config: Any) -> int | None:
    """The rows of a model's embedding by its configuration; None where that says nothing."""
    return getattr(config.get_text_config(), "vocab_size", None)


def check_tokens(config: Any, tokenizer: Any, model: str) -> None:
    """UserError where the tokenizer has tokens that `model` has no row for; more rows than tokens are fine."""
    tokens, rows = token_count(tokenizer), embedding_rows(config)
    if rows is not None and tokens > rows:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise UserError(
            f"the tokenizer '{name}' has {tokens:,} tokens and the embedding of '{model}' {rows:,} rows: a text with "
            f"one of the last {tokens - rows:,} tokens cannot be read; take the model's own tokenizer"
        )
