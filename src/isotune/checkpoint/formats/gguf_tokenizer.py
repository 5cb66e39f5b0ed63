"""A tokenizer in a GGUF file: its vocabulary, the order of its merges, and llama.cpp's name of how it cuts words.

llama.cpp has its own code for each way of cutting words, and knows it by a name: of byte-level BPE those of GPT-2,
Llama 3 and Qwen2 are written here, and the BPE of SentencePiece (Llama 2, Mistral), which cuts none.
"""

import json
from typing import Any

from isotune.data.sft.tokenization import ConversationEncoder
from isotune.data.tokenizer import prefix_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
GPT2, LLAMA3, QWEN2 = "gpt-2", "llama-bpe", "qwen2"
CUTS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": LLAMA3,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": QWEN2,
}
Whole = dict[str, Any]  # a tokenizer.json


class NotWritten(Exception):
    """Why a model cannot be written, as a clause."""


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add a tokenizer to a GGUF writer, a token for each of the `rows` of the embedding; NotWritten says why not."""
    whole: Whole = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = whole["model"]["type"]
    if kind != "BPE":
        raise NotWritten(f"a tokenizer of the kind {kind} is not written here, only BPE")
    before = prefix_of(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]):
        raise NotWritten(f"llama.cpp puts no {''.join(tokenizer.convert_ids_to_tokens(before))} before a text")
    tokens = [tokenizer.backend_tokenizer.id_to_token(number) for number in range(rows)]
    if whole["model"].get("byte_fallback"):
        _add_sentencepiece(writer, whole, tokens)
    else:
        _add_byte_level(writer, whole)
    writer.add_token_list([f"[PAD{number}]" if token is None else token for number, token in enumerate(tokens)])
    writer.add_token_types(_types(whole, tokens))
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(False)
    for role in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    if ends := ConversationEncoder(tokenizer).end_ids - {tokenizer.eos_token_id}:
        writer.add_eot_token_id(min(ends))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _types(whole: Whole, tokens: list[str | None]) -> list[int]:
    added = {token["id"]: token for token in whole["added_tokens"]}
    unknown, falls_back = whole["model"].get("unk_token"), bool(whole["model"].get("byte_fallback"))
    types = list[int]()
    for number, token in enumerate(tokens):
        if token is None:
            types.append(UNUSED)
        elif falls_back and token == unknown:
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if falls_back and _is_byte(token) else NORMAL)
    return types


def _add_byte_level(writer: Any, whole: Whole) -> None:
    rule, model = _rule(whole), whole["model"]
    if bool(model.get("ignore_merges")) != (rule == LLAMA3):  # a word that is a token is taken as it is
        raise NotWritten(f"llama.cpp merges the words of the rule {rule!r} otherwise than this tokenizer")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_merges([" ".join(pair) for pair in _merges(whole)])


def _rule(whole: Whole) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer cuts words."""
    kinds = [step["type"] for step in _steps(whole["normalizer"], "normalizers")]
    if set(kinds) - {"NFC"}:  # which llama.cpp leaves to whoever writes the text
        raise NotWritten(f"a tokenizer that normalizes by {', '.join(kinds)} is not written here")
    steps = _steps(whole["pre_tokenizer"], "pretokenizers")
    if steps and steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        if len(steps) == 1 and steps[0]["use_regex"]:
            return GPT2
        if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"]:
            pattern, how = steps[0]["pattern"].get("Regex"), (steps[0]["behavior"], steps[0]["invert"])
            if pattern in CUTS and how == ("Isolated", False):
                return CUTS[pattern]
    raise NotWritten(
        "the tokenizer cuts words by none of the rules that are written here (GPT-2's, Llama 3's, Qwen2's)"
    )


def _add_sentencepiece(writer: Any, whole: Whole, tokens: list[str | None]) -> None:
    """SentencePiece's BPE: llama.cpp joins the two pieces whose union has the highest score, so the first merge's."""
    kinds = [step["type"] for step in _steps(whole["normalizer"], "normalizers")]
    cuts = [step["type"] for step in _steps(whole["pre_tokenizer"], "pretokenizers")]
    if (kinds, cuts) not in ((["Prepend", "Replace"], []), ([], ["Metaspace"])):
        raise NotWritten(f"a tokenizer of SentencePiece with {', '.join([*kinds, *cuts])} is not written here")
    ranks: dict[str, int] = {}
    for rank, (one, two) in enumerate(_merges(whole)):
        ranks.setdefault(one + two, rank)
    made = {*ranks, *(token["content"] for token in whole["added_tokens"])}
    for token in tokens:
        if token is not None and len(token) > 1 and token not in made and not _is_byte(token):
            raise NotWritten(f"no merge makes the token {token!r}, and llama.cpp would")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([float(-1 - ranks[token]) if token in ranks else 0.0 for token in tokens])
    writer.add_add_space_prefix(True)


def _merges(whole: Whole) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"]]


def _steps(part: Whole | None, name: str) -> list[Whole]:
    return [] if part is None else part.get(name, [part])


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
