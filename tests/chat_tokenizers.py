"""Small tokenizers of one token a byte, with the special tokens and templates of the common families of chat models."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_templates"
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<think>", "</think>"),
]


def byte_chat_tokenizer(template: str | None = None, *, closes: bool = False, merges: bool = False, gpt2: bool = False):
    """A byte-level tokenizer with bos, eos and SPECIAL; `closes`: its post-processor appends eos to a text.

    `template` is the name of a file of TEMPLATES. With `merges` a few bytes join, among them a blank and a letter. With
    `gpt2` words are cut as GPT-2 cuts them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("Ġ", "a"), ("a", "a"), ("Ċ", "Ċ"), ("b", "a")] if merges else []
    names = ["<pad>", "<eos>", "<bos>", *alphabet, *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=pairs))
    # as Llama 3's and Qwen's: line ends stay together whatever follows, where GPT-2's would part them before a word
    words = pre_tokenizers.Split(Regex(r" ?\S+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    backend.pre_tokenizer = bytes_of if gpt2 else pre_tokenizers.Sequence([words, bytes_of])
    backend.decoder = decoders.ByteLevel()
    single = "<bos> $A <eos>" if closes else "<bos> $A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    added = [AddedToken(token, special=token not in ("<think>", "</think>"), normalized=False) for token in SPECIAL]
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in added if token.special]})
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text("utf-8") if template else None
    return tokenizer
