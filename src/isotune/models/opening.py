"""Models, configurations and tokenizers by name or by recipe; every failure is a UserError of one sentence."""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from isotune.compat.bitsandbytes import keep_trainable
from isotune.compat.deepspeed import whole_models
from isotune.config import ClassificationRecipe, Recipe, RunRecipe
from isotune.data.sft.chat_format import ChatFormat
from isotune.data.sources.source import PREFIX
from isotune.io.errors import VALUES, UserError, first_line, is_first_process
from isotune.io.extras import need
from isotune.io.folders import MODEL_CONFIG
from isotune.models.base.builtin import builtin_config, builtin_tokenizer
from isotune.models.base.head import BaseHead, draw_head, is_classifier, reorder, set_names
from isotune.models.base.hub import Located, locate
from isotune.models.base.vocabulary import add_tokens, grow_embeddings
from isotune.models.layouts.heads import head_of, is_of_head
from isotune.models.log_control import quiet_libraries
from isotune.models.packed_attention import max_positions

SayNew = Callable[[Sequence[str]], None]
NO_CLASSES = 2  # as in a configuration that says nothing of classes
ALIGNMENT = 64  # bytes: torch allocates so on a CPU
LIBRARY_CODE: dict[str, Any] = {"trust_remote_code": False}  # None would ask on the terminal whether a model's own runs
_OLD_BUFFERS = ("inv_freq", "position_ids", "masked_bias", "attn.bias", "attention.bias")  # of each block, once
# what libraries raise over a configuration or weights that are not what they say
CONFIGURATION_ERRORS = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, StrictDataclassError,
)  # fmt: skip
# ImportError: of a library that reads weights quantized in its way
LOADING_ERRORS = (OSError, *CONFIGURATION_ERRORS, ImportError, RuntimeError, SafetensorError, UnpicklingError)


@contextlib.contextmanager
def loading(failure: str, errors: tuple[type[Exception], ...] = LOADING_ERRORS) -> Iterator[None]:
    """Within it libraries are quiet, and each of `errors` becomes a UserError: `failure`, and its first line."""
    try:
        with quiet_libraries():
            yield
    except errors as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, UnpicklingError) else None
        why = f"their pickle calls {refused[1]}, and code in a file is never run" if refused else first_line(error)
        raise UserError(f"{failure}: {why}") from error


def making(name: str) -> AbstractContextManager[None]:
    """`loading` for a model that is made of a configuration alone; a device without room is no mistake in it."""
    return loading(f"the configuration of '{name}' makes no model", CONFIGURATION_ERRORS)


def load_pretrained(
    name: str,
    *,
    auto: Any,
    may_lack: Sequence[str] = (),
    revision: str | None = None,
    say_new: SayNew | None = None,
    **kwargs: Any,
) -> Any:
    """A model of a folder or Hub id with all its weights, but for those of the modules `may_lack`.

    `auto` is transformers' auto class of the model, and `kwargs` are of its `from_pretrained`. `revision` is a branch,
    tag or commit of a Hub id. `say_new` is told the names of the parameters that no file has.
    """
    located = locate(name, "model", revision, weights=True)
    if os.path.isdir(name) and check_safetensors(Path(name)):
        kwargs["use_safetensors"] = True
    if located.pickles:
        how = "torch's restricted unpickler reads tensors from it, and no code is run"
        _say_once(f"note        the weights of {name} are a pickle ({located.pickles[0]}): {how}")
    if str(auto.__name__) == AutoModelForCausalLM.__name__:
        _check_generation_config(name, located)
    if "config" not in kwargs:
        kwargs["config"] = load_pretrained_config(name, revision=revision)
    may_differ = may_lack if kwargs.get("ignore_mismatched_sizes") else ()
    kwargs["ignore_mismatched_sizes"] = True  # transformers' own error names no tensor
    with loading(f"the weights of '{name}' cannot be loaded"):
        model, loaded = auto.from_pretrained(
            located.name, output_loading_info=True, **located.arguments, **LIBRARY_CODE, **kwargs
        )
    other_size = [str(key[0] if isinstance(key, tuple) else key) for key in loaded.get("mismatched_keys", ())]
    if wrong := sorted(key for key in other_size if not is_of_head(key, may_differ)):
        raise UserError(f"the weights of '{name}' have another size of {wrong[0]} than {type(model).__name__}")
    missing = sorted(key for key in loaded["missing_keys"] if not is_of_head(key, may_lack))
    if missing:
        raise UserError(
            f"the weights of '{name}' lack {len(missing)} tensors of {type(model).__name__}, {missing[0]} first: "
            "they would be random"
        )
    if loaded["missing_keys"] and say_new is not None:
        say_new(sorted(loaded["missing_keys"]))
    _say_unused(name, model, loaded["unexpected_keys"])
    return model


def _say_unused(name: str, model: Any, keys: Iterable[str]) -> None:
    """Name what the weights hold of the model's blocks and the configuration leaves out, such as a layer or biases.

    Heads of other tasks, and buffers that earlier versions of transformers wrote, are passed over.
    """
    blocks = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    unused = sorted(key for key in keys if key.startswith(blocks) and not key.endswith(_OLD_BUFFERS))
    if unused:
        _say_once(
            f"note        the weights of {name} hold {len(unused)} tensors that its {MODEL_CONFIG} leaves out, "
            f"{unused[0]} first: they are not used"
        )


def _check_generation_config(name: str, located: Located) -> None:
    """Refuse a generation_config.json that cannot be read, which says where answers end, by its name.

    transformers passes one over that is no JSON, and calls the weights wrong where a value is.
    """
    file = "generation_config.json"
    try:
        with quiet_libraries():
            cast(Any, GenerationConfig).from_pretrained(located.name, **located.arguments)
    except LOADING_ERRORS as error:
        is_absent = isinstance(error, OSError) and "not a valid JSON" not in str(error)
        if not is_absent:
            raise UserError(f"{file} of '{name}' cannot be read: {first_line(error)}") from error


@cache
def _say_once(line: str) -> None:
    if is_first_process():
        print(line, file=sys.stderr)


def load_pretrained_config(name: str, key: str = "the model", revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a folder or Hub id, which a message calls `key`; `revision` as in `load_pretrained`."""
    located = locate(name, "model", revision)
    with loading(f"{key} '{name}' cannot be loaded"):
        config = AutoConfig.from_pretrained(located.name, **located.arguments, **LIBRARY_CODE)
    if is_classifier(config) and config.id2label and sorted(config.id2label) != list(range(len(config.id2label))):
        raise UserError(f"id2label in {MODEL_CONFIG} of '{name}' must number its classes from 0 on, without gaps")
    # what some files ask for beside the logits, which nobody here reads, and which no packed attention returns
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    return config


def load_pretrained_tokenizer(name: str, revision: str | None = None, **kwargs: Any) -> Any:
    """The tokenizer of a folder or Hub id; `kwargs` are of `from_pretrained`, `revision` as in `load_pretrained`."""
    located = locate(name, "tokenizer", revision)
    with loading(f"the tokenizer of '{name}' cannot be loaded", (Exception,)):  # tokenizers has no class of its own
        return AutoTokenizer.from_pretrained(located.name, **{**located.arguments, **LIBRARY_CODE, **kwargs})


def check_weights(folder: Path, needed: str | None = None) -> None:
    """Refuse a folder without safetensors files, without `needed` among them, or with a truncated one."""
    files = check_safetensors(folder)
    if not files or (needed is not None and folder / needed not in files):
        raise UserError(f"{folder} holds no {needed or '.safetensors file'}, and weights are read from nothing else")


def check_safetensors(folder: Path) -> list[Path]:
    """The safetensors files of a folder; each is opened, so that a truncated one is named before minutes are spent."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with (
            loading(f"{file} is not a complete safetensors file", (SafetensorError, OSError)),
            safe_open(file, framework="pt") as tensors,
        ):
            tensors.keys()
    return files


def compute_dtype(recipe: RunRecipe) -> torch.dtype:
    """Dtype of matrix products."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[recipe.mixed_precision]


def weights_dtype(recipe: RunRecipe) -> torch.dtype:
    """Dtype of the base model's weights.

    Trained weights stay in fp32, and autocast computes in 16 bits from them. Frozen weights are never updated, so they
    are kept in the compute dtype, which takes half the memory and no casts.
    """
    return torch.float32 if recipe.tune == "full" else compute_dtype(recipe)


def load_tokenizer(recipe: RunRecipe, needed: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, or else its model's; it must have the `needed` special tokens.

    It has the tokens that the recipe adds. For conversations it carries the chat template of the recipe's
    `chat_format`, whatever it came with, and for texts to classify none, because they are read as they stand.
    """
    tokenizer = _load_tokenizer(recipe, needed)
    add_tokens(tokenizer, recipe.add_tokens or ())
    if isinstance(recipe, Recipe):
        ChatFormat.of(recipe.chat_format, tokenizer).apply(tokenizer)
    elif getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = None
    return tokenizer


def _load_tokenizer(recipe: RunRecipe, needed: Sequence[str]) -> PreTrainedTokenizerBase:
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    if name.startswith(PREFIX):
        return builtin_tokenizer(name)
    revision = recipe.model_revision if name == recipe.model_name_or_path else None
    tokenizer: PreTrainedTokenizerBase = load_pretrained_tokenizer(name, revision, use_fast=True)
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty one of some kinds where the files are missing
        raise UserError(f"tokenizer '{name}' encodes a letter to no token: is its tokenizer.json there?")
    for role in needed:
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise UserError(
                f"the tokenizer of '{name}' has no {role} token: add `{role}_token` to its tokenizer_config.json"
            )
    return tokenizer


def load_config(recipe: RunRecipe) -> PreTrainedConfig:
    """The model's configuration; UserError where it is none that this task can train."""
    name = recipe.model_name_or_path
    config = (
        builtin_config(name)
        if name.startswith(PREFIX)
        else load_pretrained_config(name, "model_name_or_path", recipe.model_revision)
    )
    check_kind(recipe, config)
    _check_quantized(recipe, config)
    if isinstance(recipe, Recipe) and is_classifier(config):  # whose classes are none of a language model
        set_names(config, NO_CLASSES, None, None)
    return config


def _check_quantized(recipe: RunRecipe, config: PreTrainedConfig) -> None:
    """UserError for a base that is stored quantized, where the recipe trains all of it or another kind of 4 bits."""
    stored: Any = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if stored is None:
        return
    how = stored if isinstance(stored, dict) else stored.to_dict()
    four_bit, eight_bit = how.get("load_in_4bit"), how.get("load_in_8bit")
    method = how.get("quant_method") or ("bitsandbytes" if four_bit or eight_bit else "unknown")
    what = f"'{recipe.model_name_or_path}' is stored quantized ({method}{', in 8 bits' if eight_bit else ''})"
    if recipe.tune == "full" and method in ("bitsandbytes", "gptq", "awq"):
        raise UserError(f"{what}, and tune: full trains every weight: say tune: lora")
    if recipe.tune == "qlora":
        if not (method == "bitsandbytes" and four_bit):
            raise UserError(f"{what}, and tune: qlora trains over 4 bits of bitsandbytes: say tune: lora")
        kind = how.get("bnb_4bit_quant_type", "fp4")
        if kind != recipe.bnb_4bit_quant_type:
            raise UserError(f"'{recipe.model_name_or_path}' is stored in {kind}: say bnb_4bit_quant_type: {kind}")


AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


def within_positions(recipe: AnyRecipe, config: PreTrainedConfig) -> AnyRecipe:
    """The recipe with rows that the model has positions for: as many tokens as those, where nobody gave max_seq_length.

    UserError where somebody gave more.
    """
    positions = max_positions(config)
    if positions is None or recipe.max_seq_length <= positions:
        return recipe
    if "max_seq_length" not in recipe.given:
        return recipe.with_values(max_seq_length=positions)
    raise UserError(
        f"max_seq_length {recipe.max_seq_length} is beyond the {positions} positions of "
        f"'{recipe.model_name_or_path}': lower max_seq_length to {positions} or less",
        reason=VALUES,
    )


def check_kind(recipe: RunRecipe, config: PreTrainedConfig) -> None:
    """UserError where transformers has no classifier, or no causal language model, of this type."""
    if isinstance(recipe, ClassificationRecipe):
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(f"model type '{config.model_type}' has no classifier in transformers: choose an encoder")
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model type '{config.model_type}' has no causal language model in transformers: choose a decoder"
        )
    with loading(f"model type '{config.model_type}' cannot be trained"):  # some hold several language models
        config.get_text_config()


def is_made_here(recipe: RunRecipe) -> bool:
    """Whether the base model's weights are drawn from the seed, and so are in no file."""
    return recipe.model_init == "random" or recipe.model_name_or_path.startswith(PREFIX)


def load_base_model(
    recipe: RunRecipe,
    config: PreTrainedConfig,
    device: torch.device,
    head: BaseHead | None = None,
    say_new: SayNew | None = None,
    new_rows: Sequence[int] = (),
) -> PreTrainedModel:
    """The base model of a recipe, before adapters, on `device`: a causal LM or a classifier, by the recipe's type.

    `config` is what `load_config` returned. A classifier has a head for its `num_labels` classes; a head that is in no
    file is drawn from the recipe's seed, and so is one that `head` says is not the task's. 4-bit weights are quantized
    on `device`. `say_new` is told the parameters that no file has; `new_rows` are those of `vocabulary.new_rows`.
    """
    model = _load_base_model(recipe, config, device, head, say_new)
    grow_embeddings(model, new_rows)
    return model


def empty_base_model(
    recipe: RunRecipe, config: PreTrainedConfig, new_rows: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Any:
    """The same without weights, on torch's default device, with values that mean nothing."""
    is_classifier = isinstance(recipe, ClassificationRecipe)
    auto: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    with making(recipe.model_name_or_path):
        model = auto.from_config(config, **LIBRARY_CODE, **({} if dtype is None else {"dtype": dtype}))
    grow_embeddings(model, new_rows)
    return model


def _load_base_model(
    recipe: RunRecipe, config: PreTrainedConfig, device: torch.device, head: BaseHead | None, say_new: SayNew | None
) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    new_modules = list[str]()
    if isinstance(recipe, ClassificationRecipe):
        auto = AutoModelForSequenceClassification
    if is_made_here(recipe):
        torch.manual_seed(recipe.seed)
        with whole_models(), making(recipe.model_name_or_path):
            model: Any = auto.from_config(config, **LIBRARY_CODE, dtype=torch.float32)
        return model.to(device=device, dtype=weights_dtype(recipe))
    if auto is AutoModelForSequenceClassification:
        with making(recipe.model_name_or_path):
            new_modules = head_of(config)
    name = recipe.model_name_or_path
    kwargs: dict[str, Any] = {"config": config, "dtype": weights_dtype(recipe), "revision": recipe.model_revision}
    replaced = head is not None and head.replaces
    if replaced:  # the old head may have another size
        kwargs["ignore_mismatched_sizes"] = True
    if recipe.tune == "qlora":
        kwargs |= {"quantization_config": _four_bit(recipe, device, new_modules), "device_map": {"": device}}
        with whole_models():
            model = load_pretrained(name, auto=auto, may_lack=new_modules, say_new=say_new, **kwargs)
    else:
        if new_modules:
            torch.manual_seed(recipe.seed)
        changes = bool(new_modules or recipe.add_tokens or recipe.resize_embeddings)  # before an engine shards it
        with whole_models() if changes else contextlib.nullcontext():
            model = load_pretrained(name, auto=auto, may_lack=new_modules, say_new=say_new, **kwargs).to(device)
        align_weights(model)
    keep_trainable(model)  # beside tune: lora too, whose base may be stored in 4 bits
    if replaced:
        draw_head(model, recipe.seed)
    if head is not None and head.order is not None:
        reorder(model, head.order)
    return model


@torch.no_grad()
def align_weights(model: Any) -> None:
    """Move weights on a CPU to where torch puts tensors of its own.

    Those of a file are mapped from it, at any address, unless processes share the loading. The bits of a product depend
    on the address of its factors modulo ALIGNMENT, so they would depend on the launch.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _four_bit(recipe: RunRecipe, device: torch.device, whole_modules: Sequence[str]) -> BitsAndBytesConfig:
    need("bitsandbytes", "tune: qlora")
    try:
        import bitsandbytes  # noqa: F401  (slow to import, and only QLoRA needs it)
    except Exception as error:
        raise UserError(f"tune: qlora needs bitsandbytes, which cannot be loaded: {first_line(error)}") from error
    if device.type not in ("cuda", "cpu", "xpu"):
        raise UserError(f"tune: qlora cannot run on a {device.type} device: use tune: lora")
    if recipe.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bf16: say bf16: false and fp16: true for tune: qlora")
    return four_bit_config(
        recipe.bnb_4bit_quant_type,
        recipe.bnb_4bit_use_double_quant,
        compute_dtype(recipe),
        whole_modules,
        # a sharded engine flattens 4-bit weights only together with others of the same storage dtype
        storage_dtype=compute_dtype(recipe),
    )


def skip_patterns(whole_modules: Sequence[str]) -> list[str]:
    """The regular expressions by which transformers leaves modules out of quantization, wherever they are."""
    return [rf"(.*\.)?{name}" for name in whole_modules]


def four_bit_config(
    quant_type: str,
    double_quant: bool,
    compute_dtype: torch.dtype,
    whole_modules: Sequence[str],
    storage_dtype: torch.dtype | None = None,
) -> BitsAndBytesConfig:
    """How to quantize a model to 4 bits, except for `whole_modules`, such as a head, wherever they are in the model.

    Without `whole_modules` transformers chooses, which knows output layers but not a pooler. The packed weights are
    uint8 where there is no `storage_dtype`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype,
        llm_int8_skip_modules=skip_patterns(whole_modules) or None,  # for 4 bits too, despite its name
    )
