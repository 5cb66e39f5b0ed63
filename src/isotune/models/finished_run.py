"""The model and tokenizer of a finished run, for inference, evaluation and export, and merging its adapter.

What cannot be found, read or loaded completely is a UserError of one sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from isotune.config.recipes import kind_of
from isotune.config.schema import DATA, MODEL, parse
from isotune.config.task_types import SINGLE_LABEL
from isotune.data.sft.chat_format import GUANACO, ChatFormat
from isotune.data.sft.conversations import render_prompt
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.io.errors import UserError, shown
from isotune.io.folders import ADAPTER_CONFIG, MODEL_CONFIG, described
from isotune.io.reading import read_json_object
from isotune.io.run_files import RECIPE, SCRIPT, or_refuse, read_recipe_values
from isotune.io.shipped import script
from isotune.models.adapters.stored import brought_rows, find_base, read_adapter_config
from isotune.models.base.ending import end_generation
from isotune.models.base.head import set_names
from isotune.models.base.vocabulary import embedding_rows, grow_embeddings, token_count
from isotune.models.class_loss import PROBLEM_TYPES
from isotune.models.layouts.heads import head_of, pad_like_tokenizer, reads_last_token
from isotune.models.log_control import quiet_libraries
from isotune.models.opening import (
    LOADING_ERRORS,
    check_weights,
    four_bit_config,
    load_pretrained,
    load_pretrained_config,
    load_pretrained_tokenizer,
    loading,
    making,
)
from isotune.models.packed_attention import max_positions

PRECISION_KEYS = ("bf16", "fp16", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "seed")
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Relative to the largest logit. Merging rounds in fp32; the merged weights are then rounded to the dtype of the file,
# which moves logits by a few times the precision of that dtype (2^-23, 2^-10 and 2^-7).
PARITY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_QUESTION = "How do I boil an egg so that the yolk stays soft, and how long does it take?"
PROBE_ANSWER = (
    " Bring a pan of water to a gentle boil, lower the egg into it with a spoon and leave it there for six minutes. "
    "Then cool it under running water: otherwise it goes on cooking in its shell. Large eggs need a minute more."
)
PROBE_TOKENS = 64


@dataclass(frozen=True)
class FinishedRun:
    """The parts of a finished run."""

    folder: Path  # RUN
    settings: dict[str, Any]  # content of RUN/recipe.yaml
    model: Path  # RUN/model, a whole model or an adapter
    base: str | None  # folder or Hub id of the adapter's base model; None where RUN/model is a whole model
    base_made_here: bool  # the base is RUN/base_model, which the run itself wrote
    base_commit: str | None = None  # of a base on the Hub, as it was trained on

    @property
    def is_adapter(self) -> bool:
        """Whether RUN/model needs a base model."""
        return self.base is not None

    @property
    def training_dtype(self) -> torch.dtype:
        """Dtype of matrix products in training."""
        bf16, fp16 = (self.settings.get(key) for key in ("bf16", "fp16"))
        return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def read_run(run_dir: str | Path) -> FinishedRun:
    """Find the parts of a finished run and check that its weight files are complete."""
    folder = Path(run_dir).expanduser()
    recipe = folder / RECIPE
    if not folder.is_dir():
        none = f"there is no run directory {folder}"
        raise UserError(f"{folder} is a file, and no run directory" if folder.is_file() else none)
    if not recipe.is_file() and (folder.parent / RECIPE).is_file() and folder.name == "model":
        return read_run(folder.parent)
    if not recipe.is_file() and (folder / ADAPTER_CONFIG).is_file():  # of another program: its base as it is stored
        check_weights(folder, ADAPTER_WEIGHTS)
        return FinishedRun(folder, {"tune": "lora"}, folder, find_base(folder, folder, {})[0], False)
    if not recipe.is_file():
        what = described(folder)
        raise UserError(
            f"{folder} is not a run directory: it has no {RECIPE}" + (f", and is {what}" if what is not None else "")
        )
    settings = or_refuse(read_recipe_values, folder, f"{recipe} is not a recipe")
    model = folder / "model"
    if SCRIPT in settings:
        raise UserError(
            f"{folder} is the run of a script of its own ({settings[SCRIPT]}), and how that makes tokens of texts is "
            f"not recorded: load {model} with transformers"
        )
    _check_settings(settings, recipe)
    if not model.is_dir():
        checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*"))
        hint = f"; {folder / 'checkpoints' / checkpoints[-1]} is its last checkpoint" if checkpoints else ""
        raise UserError(f"the run {folder} has no model: {model} is missing, so its training has not finished{hint}")
    base, made_here = find_base(folder, model, settings) if (model / ADAPTER_CONFIG).is_file() else (None, False)
    check_weights(model, ADAPTER_WEIGHTS if base is not None else None)
    if made_here:
        check_weights(Path(str(base)))
    commit = None
    if base is not None and not made_here and not Path(base).is_dir():
        commit = read_adapter_config(model).get("revision") or settings.get("model_revision")
    return FinishedRun(folder, settings, model, base, made_here, commit)


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    """UserError for a value that no recipe has, of the keys that say what the model is and how it reads data."""
    keys = kind_of(settings).keys()
    for name, value in settings.items():
        key = keys.get(name)
        if key is None or value is None or not (key.group in (MODEL, DATA) or name in PRECISION_KEYS):
            continue
        try:
            parse(key, value)
        except ValueError as error:
            raise UserError(f"{file}: {name} is {shown(value)}: {error}") from None


def is_classifier(run: FinishedRun) -> bool:
    """Whether RUN/model classifies sequences, by its own configuration."""
    if run.is_adapter:
        return read_adapter_config(run.model).get("task_type") == "SEQ_CLS"
    file = run.model / MODEL_CONFIG
    config = or_refuse(read_json_object, file, f"{file} cannot be read as JSON")
    named = config.get("architectures") or ()
    return isinstance(named, list) and any(str(name).endswith("ForSequenceClassification") for name in named)


def load_run_tokenizer(run: FinishedRun) -> Any:
    """The tokenizer that the run saved with its model; it carries the chat template that the run was trained with.

    Runs of earlier versions knew Guanaco's form alone, and saved whatever template their base came with.
    """
    if run.base is not None and not any(run.model.glob("*token*.json")):  # an adapter of another program
        return load_pretrained_tokenizer(run.base)
    tokenizer = load_pretrained_tokenizer(str(run.model), local_files_only=True)
    if run.settings and "chat_format" not in run.settings and not is_classifier(run):
        ChatFormat.of(GUANACO, tokenizer).apply(tokenizer)
    return tokenizer


def load_run_model(run: FinishedRun, device: torch.device) -> Any:
    """The causal language model of a run as it was trained, on `device`, in evaluation mode.

    An adapter is returned as a `PeftModel` on its base: in the run's precision, and on a GPU in 4 bits where it was
    trained so. The CPU's 4-bit kernel takes only widths that are multiples of 64 and rounds to bf16, so there the same
    weights are dequantized.
    """
    if is_classifier(run):
        raise UserError(f"{run.folder} is the run of a classifier: {script('eval/classify.py')} evaluates it")
    if not run.is_adapter:
        return load_whole_model(run).to(device).eval()
    return add_run_adapter(run, load_run_base(run, device, dequantize=device.type == "cpu")).eval()


def load_whole_model(run: FinishedRun, dtype: torch.dtype | str = "auto") -> Any:
    """The model of a run without an adapter, by default in the dtype of its files."""
    assert not run.is_adapter
    auto = AutoModelForSequenceClassification if is_classifier(run) else AutoModelForCausalLM
    return load_pretrained(str(run.model), auto=auto, dtype=dtype)


def load_run_base(run: FinishedRun, device: torch.device, *, dequantize: bool) -> Any:
    """The base of a run's adapter on `device`, with the weights that the adapter was trained on.

    A classifier's base has a head of the adapter's size, whose weights the adapter brings. With `dequantize` a base
    that was trained in 4 bits has the values that those bits stand for.
    """
    name, head, auto = str(run.base), list[str](), AutoModelForCausalLM
    as_stored = run.base_made_here or "bf16" not in run.settings  # an adapter of another program says no precision
    kwargs: dict[str, Any] = {"dtype": "auto" if as_stored else run.training_dtype}
    kwargs["revision"] = run.base_commit
    if is_classifier(run):
        auto, config = (
            AutoModelForSequenceClassification,
            load_pretrained_config(name, "the base model", run.base_commit),
        )
        with making(name):
            head = head_of(config)
        kwargs["ignore_mismatched_sizes"] = True  # the base may be a classifier of other classes
        classes, names = _adapter_classes(run.model / ADAPTER_WEIGHTS, head), run.settings.get("label_names")
        set_names(config, classes, names, PROBLEM_TYPES[run.settings.get("task_type", SINGLE_LABEL)])
        kwargs |= {"config": config, "may_lack": head}
    if run.base_made_here or run.settings.get("tune") != "qlora":
        return _grown(run, load_pretrained(name, auto=auto, **kwargs).to(device))
    quantization = four_bit_config(
        run.settings.get("bnb_4bit_quant_type", "nf4"),
        run.settings.get("bnb_4bit_use_double_quant", True),
        run.training_dtype,
        whole_modules=head,
    )
    with quiet_libraries():
        kwargs |= {"quantization_config": quantization, "device_map": {"": device}}
        base = _grown(run, load_pretrained(name, auto=auto, **kwargs))
        return base.dequantize() if dequantize else base


def _grown(run: FinishedRun, base: Any) -> Any:
    """The base with a row for each new token whose rows the adapter brings."""
    rows = brought_rows(read_adapter_config(run.model))
    if rows and rows[-1] >= max(embedding_rows(base.config) or 0, token_count(load_run_tokenizer(run))):
        raise UserError(
            f"{run.model / ADAPTER_CONFIG}: trainable_token_indices names the row {rows[-1]:,}, and neither the base "
            "nor the tokenizer has so many"
        )
    grow_embeddings(base, rows)
    return base


def _adapter_classes(file: Path, head: Sequence[str]) -> int:
    """Classes of an adapter's head: its last matrix is the one with the fewest rows."""
    with safe_open(str(file), framework="pt") as tensors:
        names = [name for name in tensors.keys() if set(name.split(".")) & set(head) and "lora_" not in name]  # noqa: SIM118
        shapes = [tensors.get_slice(name).get_shape() for name in names]
    classes = [shape[0] for shape in shapes if len(shape) == 2]
    if not classes:
        raise UserError(f"{file} has no classification head ({' or '.join(head)})")
    return min(classes)


def add_run_adapter(run: FinishedRun, base: Any) -> Any:
    """The run's adapter on top of a loaded base, as a `PeftModel`."""
    with loading(f"the adapter in {run.model} does not fit its base {run.base}", (*LOADING_ERRORS, TypeError)):
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(run.model), torch_device=str(base.device))


@dataclass(frozen=True)
class Parity:
    """How far merging moves the logits of a fixed input, with both models in fp32: absolute, of a single logit."""

    largest_difference: float
    largest_logit: float  # of the adapter's model
    tolerance: float  # upper bound of `largest_difference`, for the dtype of the file
    equal: int  # places of the input with the same likeliest class, or the same greedy token
    compared: int  # of so many

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; false for NaN."""
        return self.largest_difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"parity: largest absolute logit difference {self.largest_difference:.3g} "
            f"(tolerance {self.tolerance:.3g}, largest logit {self.largest_logit:.3g}); the likeliest "
            f"token or class is the same at {self.equal} of {self.compared} places"
        )


def merge_run(run: FinishedRun, dtype: torch.dtype | None = None) -> tuple[Any, Any, Parity]:
    """Merge a run's adapter into its base: W + scale * B @ A in fp32, rounded once to the dtype of the file.

    A base that was trained in 4 bits is dequantized and stays so: the adapter was trained on these values, and a 4-bit
    matrix plus a small update would be rounded back to the same 4 bits. Takes the memory of the model in fp32, and no
    GPU. `dtype` is of the merged weights; None is that of the base in training. Returns the merged model, its
    tokenizer, and its measured difference from the adapter on its base, which must be within the tolerance.
    """
    assert run.is_adapter, "only an adapter can be merged"
    tokenizer = load_run_tokenizer(run)
    base = load_run_base(run, torch.device("cpu"), dequantize=True)
    settle(base, tokenizer)
    file_dtype = dtype or base.dtype
    adapted = add_run_adapter(run, base.float()).eval()
    probe = probe_tokens(run, tokenizer, base.config)
    expected = _probe_logits(adapted, probe)
    with loading(f"the adapter in {run.model} cannot be merged", (ValueError,)):
        merged = adapted.merge_and_unload(safe_merge=True)
    # through the dtype of the file and back, so that its rounding is measured too
    merged_logits = _probe_logits(merged.to(file_dtype).float(), probe)
    merged = merged.to(file_dtype)
    parity = compare_logits(expected, merged_logits, PARITY_TOLERANCE.get(file_dtype, PARITY_TOLERANCE[torch.float32]))
    if not parity.holds:
        raise UserError(
            f"the merged model of {run.folder} is not the adapter model ({parity}), so nothing was written: "
            f"{'its weights are not finite' if expected.isnan().any() else 'try --dtype float32'}"
        )
    return merged, tokenizer, parity


def settle(model: Any, tokenizer: Any) -> None:
    """Write into a stock model's configuration what training would have: how its tokenizer pads, where an answer ends.

    Neither is in an adapter's files nor in a checkpoint's.
    """
    if model.can_generate():
        end_generation(model, tokenizer)
    elif reads_last_token(model):
        pad_like_tokenizer(model, tokenizer.pad_token_id)
        tokenizer.padding_side = "right"


def probe_tokens(run: FinishedRun, tokenizer: Any, config: Any) -> Tensor:
    """A fixed input for a run's model, int64 [2, tokens]: a conversation, and tokens from all over the vocabulary.

    The conversation stands as in training, and a classifier reads it as a text; it is truncated or repeated to fill its
    row of 64 tokens, or as many as the model has positions.
    """
    if is_classifier(run):
        conversation = tokenizer(render_prompt(PROBE_QUESTION) + PROBE_ANSWER)["input_ids"]
    else:
        encoder = ConversationEncoder(tokenizer)
        prompt = encoder.prompt([{"role": "user", "content": PROBE_QUESTION}])
        conversation = encoder.prompt_tokens(prompt + PROBE_ANSWER)
    vocabulary: int = config.get_text_config().vocab_size
    repeated = (conversation * (PROBE_TOKENS // len(conversation) + 1))[:PROBE_TOKENS]
    spread = [(i * vocabulary) // PROBE_TOKENS for i in range(PROBE_TOKENS)]
    return torch.tensor([repeated, spread])[:, : max_positions(config) or PROBE_TOKENS]


def without_cache(model: Any) -> dict[str, bool]:
    """What a forward of one text is given besides: hybrids whose first block has no attention fail with a cache."""
    return {"use_cache": False} if model.can_generate() else {}


def _probe_logits(model: Any, probe: Tensor) -> Tensor:
    """Logits of the fixed input: float32 [2, tokens, vocabulary], or [2, classes] of a classifier, on the CPU."""
    tokens = probe.to(model.device)
    with torch.no_grad():  # one by one: heads that read the last token take no batch where nothing pads
        more = without_cache(model)
        logits = [model(input_ids=row, attention_mask=torch.ones_like(row), **more).logits for row in tokens.split(1)]
    return torch.cat(logits).float().cpu()


def compare_logits(expected: Tensor, actual: Tensor, relative_tolerance: float) -> Parity:
    """The parity of two models' logits; the tolerance is relative to the largest expected logit."""
    largest, same = float(expected.abs().max()), expected.argmax(-1) == actual.argmax(-1)
    difference = float((expected - actual).abs().max())
    return Parity(difference, largest, relative_tolerance * largest, int(same.sum()), same.numel())
