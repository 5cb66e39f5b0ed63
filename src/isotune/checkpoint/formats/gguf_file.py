"""`model.gguf` for llama.cpp and Ollama: Llama, Mistral, Qwen2 and Qwen3 with a tokenizer that llama.cpp has.

The file is written by llama.cpp's own package `gguf`, in the conventions of its converter: queries and keys of a Llama
in the order that its rotary embedding takes, vectors in float32. It is read back by transformers' GGUF reader, which
others wrote: the logits must be those of the model, and the tokens of a text those of its tokenizer. What cannot be
written so is refused, with the way to llama.cpp's converter, which knows all of its models.
"""

import contextlib
import io
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from isotune.checkpoint.final_model import PROBE_TEXT, replace_folder, staging_for
from isotune.checkpoint.formats.gguf_tokenizer import NotWritten, add_tokenizer
from isotune.checkpoint.formats.state_dict import save_settings
from isotune.io.errors import UserError, first_line
from isotune.io.extras import need
from isotune.models.log_control import quiet_libraries

FILE = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model type -> llama.cpp's
COMPARED_TEXTS = (PROBE_TEXT, "It's 12345 o'clock,\n\n  isn't it?\tWe'LL see;  (maybe) a_b-c. Ünïcödé!!\n")


def need_gguf() -> None:
    """UserError where the package that writes such a file is missing."""
    need("gguf", "--format gguf")


def save_gguf(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write `model.gguf` in the dtype of the model, beside its configuration and tokenizer; NotWritten says why not."""
    architecture = _checked_architecture(model.config)
    with staging_for(folder) as staging:
        staging.mkdir()
        _write(model, tokenizer, architecture, staging / FILE)
        save_settings(model, tokenizer, staging)
        _compare_tokens(tokenizer, staging)
    replace_folder(staging, folder)


def load_gguf(folder: Path) -> Any:
    """The model of a folder with `model.gguf`, by transformers' reader, in fp32; NotWritten where it cannot read it."""
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar asks nobody
        try:
            auto = cast(Any, AutoModelForCausalLM)
            return auto.from_pretrained(str(folder), gguf_file=FILE, dtype=torch.float32).eval()
        except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            raise NotWritten(f"transformers cannot read the file back ({first_line(error)})") from error


def refusal(why: NotWritten, merge: bool, run: Path) -> UserError:
    """The sentence that names the way by llama.cpp's converter."""
    export = f"isotune export {run}{' --merge' if merge else ''}"
    return UserError(f"--format gguf: {why}: give the folder of `{export}` to llama.cpp's convert_hf_to_gguf.py")


def _checked_architecture(config: Any) -> str:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise NotWritten(f"a model of the type {kind!r} is not written here (but {', '.join(ARCHITECTURES)})")
    rope: dict[str, Any] = config.rope_parameters or {}
    odd = {
        f"rotary embeddings of the kind {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "biases": getattr(config, "mlp_bias", False) or (kind != "qwen2" and getattr(config, "attention_bias", False)),
        "a sliding window": getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None),
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
    }
    if why := next((what for what, is_there in odd.items() if is_there), None):
        raise NotWritten(f"a model with {why} is not written here")
    return ARCHITECTURES[kind]


def _write(model: Any, tokenizer: Any, architecture: str, file: Path) -> None:
    library: Any = import_module("gguf")
    config = model.config
    dtypes = {torch.float16: ("F16", "MOSTLY_F16"), torch.bfloat16: ("BF16", "MOSTLY_BF16")}
    name, file_type = dtypes.get(model.dtype, ("F32", "ALL_F32"))
    writer = library.GGUFWriter(str(file), architecture)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    rope: dict[str, Any] = config.rope_parameters or {}
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_file_type(library.LlamaFileType[file_type])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_rope_dimension_count(head_size)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    names = library.get_tensor_name_map(library.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for long, tensor in model.state_dict().items():
        if long == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, ending = long.rpartition(".")
        short = names.get_name(stem)
        if short is None:
            raise NotWritten(f"llama.cpp has no place for {long}")
        values = tensor.float().cpu().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            values = _rotary_order(values, heads if stem.endswith("q_proj") else kv_heads)
        kind = library.GGMLQuantizationType[name if values.ndim > 1 else "F32"]
        writer.add_tensor(f"{short}.{ending}", library.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rotary_order(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in pairs that rotate together, where transformers has the halves of the pairs apart."""
    apart = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(apart.swapaxes(1, 2).reshape(weights.shape))


def _compare_tokens(tokenizer: Any, folder: Path) -> None:
    """NotWritten where the tokenizer of the file cuts texts otherwise than the run's."""
    with quiet_libraries():
        read = cast(Any, AutoTokenizer).from_pretrained(str(folder), gguf_file=FILE)
    for text in COMPARED_TEXTS:
        own, found = (one.backend_tokenizer.encode(text, add_special_tokens=False).ids for one in (tokenizer, read))
        if own != found:
            raise NotWritten(f"the tokenizer that is read back from the file cuts {text!r} otherwise")
