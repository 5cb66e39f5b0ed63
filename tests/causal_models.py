"""Every causal language model of the installed transformers that builds from a small configuration, measured.

`python -m tests.causal_models` writes the table of docs/models.md; tests/numerics/test_causal_table.py holds it.
"""

import contextlib
import copy
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from isotune.io.errors import RunFault, UserError
from isotune.models.causal import install_causal
from isotune.models.isolation import check_isolation, packed_inputs
from tests.models_table import PAGE, entries_of
from tests.small_adapters import (
    PROMPTS,
    Adapted,
    LoraCheck,
    answered_alike,
    difference_of_logits,
    each_alone,
    gradients,
    largest_difference,
    power_of_ten,
    recipe_in,
)

BEGIN, END = "<!-- causal models: written by python -m tests.causal_models -->", "<!-- end -->"
LENGTHS = (9, 30, 17)
LARGEST = 6_000_000  # parameters; a configuration that stays larger is not small

# What a configuration is made small by, where it has such a key.
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
    "max_position_embeddings": 512, "d_model": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "ffn_dim": 48,
    "moe_intermediate_size": 16, "word_embed_proj_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "num_layers": 2, "num_heads": 4, "rotary_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "sliding_window": 16, "attention_chunk_size": 16,
}  # fmt: skip
# The parts of a model of pictures and texts.
TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
    "max_position_embeddings": 512, "sliding_window": 16,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PATCHES = {"image_size": 32, "patch_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
INDEXER |= {"indexer_compress_ratio": 2}
WINDOWED = ["sliding_attention", "full_attention"]
PER_LAYER = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
# Where these keys alone make no model.
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "deepseek_v2": {"head_dim": 4, "topk_method": "greedy", "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": {"head_dim": 4, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "axk1": {"head_dim": 4, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "axk2": {"head_dim": 4, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "youtu": {"head_dim": 4, "num_key_value_heads": 4},
    "deepseek_v32": {"head_dim": 4, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "glm_moe_dsa": {"head_dim": 4, "num_key_value_heads": 4},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "squeezebert": {"embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    "dbrx": {
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 2}
    | {"head_dim": 4, "num_key_value_heads": 4},
    "gemma3n_text": PER_LAYER | {"laurel_rank": 8, "num_kv_shared_layers": 0, "layer_types": WINDOWED},
    "gemma4_text": PER_LAYER | {"global_head_dim": 8, "layer_types": WINDOWED},
    "gemma4_unified_text": {"global_head_dim": 8, "layer_types": WINDOWED},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8, "shared_intermediate_size": 48}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "gemma3": {"text_config": TEXT | {"layer_types": WINDOWED}, "vision_config": VISION | PATCHES}
    | {"mm_tokens_per_image": 4},
    "gemma4": {"text_config": TEXT | PER_LAYER | {"global_head_dim": 8, "layer_types": WINDOWED}},
    "gemma4_unified": {"text_config": TEXT | {"global_head_dim": 8, "layer_types": WINDOWED}},
    "qwen3_5": {"text_config": TEXT | HYBRID, "vision_config": VISION},
    "qwen3_5_moe": {"text_config": TEXT | HYBRID | EXPERTS, "vision_config": VISION},
    "qwen4_exp": {"text_config": TEXT | EXPERTS | HYBRID | INDEXER, "vision_config": VISION},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"], "attention_head_size": 8},
    "perceiver": {"num_latents": 4, "d_latents": 32, "num_self_attends_per_block": 1}
    | {"num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "t5gemma2": {"encoder": {"text_config": TEXT, "vision_config": VISION | PATCHES}, "decoder": TEXT},
    "llama4": {"text_config": TEXT | {"num_local_experts": 4}, "vision_config": VISION | PATCHES},
    "fuyu": {"text_config": TEXT, "image_size": 32, "patch_size": 16},
    "got_ocr2": {"text_config": TEXT, "vision_config": VISION | PATCHES | {"mlp_dim": 48, "output_channels": 8}},
    "emu3": {"text_config": TEXT, "vq_config": {"base_channels": 8, "hidden_size": 8, "codebook_size": 16}},
    "mllama": {"text_config": TEXT | {"cross_attention_layers": [1]}, "vision_config": VISION | PATCHES},
    "git": {"vision_config": VISION | PATCHES},
    "moss_transcribe_diarize": {"text_config": TEXT, "audio_config": VISION},
    "phi4_multimodal": {"vision_config": VISION | PATCHES | {"crop_size": 32}}
    | {"audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4}},
    "esmc": {"vocab_size": 33, "mask_token_id": 32, "num_key_value_heads": 4},
    "modernvbert": {"text_config": TEXT | {"num_hidden_layers": 3}, "vision_config": VISION | PATCHES},
    "ultravbert": {"text_config": TEXT, "vision_config": VISION | PATCHES},
    "t5gemma": {"encoder": TEXT, "decoder": TEXT},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_next": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 8}
    | {"attn_layer_indices": [1]},
    "bailing_hybrid": HYBRID | {"head_dim": 4, "num_key_value_heads": 4},
    "kimi_linear": HYBRID | {"head_dim": 4, "num_key_value_heads": 4},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": HYBRID | INDEXER,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # whose cache counts on multiples of 64
}


@dataclass(frozen=True)
class Row:
    """One type of model: how it runs rows, and its largest differences to the stock model on each document alone."""

    kind: str
    form: str  # packed or padded
    notes: str  # why it is padded, and what is refused
    leak: float
    logits: float  # relative to the largest
    loss: float  # relative
    gradient: float  # of the parameter that differs most, relative to its norm
    lora: Adapted
    answers: int | None  # of PROMPTS, in a batch as alone; None where generation is refused

    def line(self) -> str:
        """The line of the table; figures as powers of ten, which other machines reach too."""
        figures = map(power_of_ten, (self.leak, self.logits, self.loss, self.gradient))
        answers = "refused" if self.answers is None else f"{self.answers} of {len(PROMPTS)}"
        cells = (self.form, *figures, *self.lora.cells, "yes" if self.answers == len(PROMPTS) else answers, self.notes)
        return f"| `{self.kind}` | {' | '.join(cells)} |"


class NotSmall(Exception):
    """No model of this type can be built from a small configuration."""


def small_model(kind: str) -> Any:
    """A model of random weights, norms and biases, and sinks included; NotSmall where there is none."""
    try:
        config = small_config(kind)
        with torch.device("meta"):
            numel = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if numel > LARGEST:
            raise NotSmall(f"{numel:,} parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if int(model.config.get_text_config().vocab_size) > LARGEST:
            raise NotSmall("vocabulary")
        model(input_ids=torch.arange(4, 13)[None], use_cache=False)
    except NotSmall:
        raise
    except Exception as error:
        raise NotSmall(f"{type(error).__name__}: {error}") from error
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.05)
    return model


def small_config(kind: str, **more: Any) -> Any:
    """A configuration of this type with few and narrow layers, and `more` keys."""
    stock = AutoConfig.for_model(kind)
    keys = {key: value for key, value in SMALL.items() if _has(stock, key)} | OWN.get(kind, {})
    keys |= more
    for _ in range(len(keys)):
        try:
            return AutoConfig.for_model(kind, **keys)
        except Exception as error:  # a key that this type computes from others
            refused = [key for key in keys if re.search(rf"\b{key}\b", str(error))]
            if not refused:
                raise
            del keys[refused[0]]
    return stock


def _has(config: Any, key: str) -> bool:
    try:
        return getattr(config, key, None) not in (None, -1)
    except Exception:  # a key of which each layer has its own
        return True


def measure(kind: str, **adapter: Any) -> Row:
    """Run a packed row of three documents, and each document alone; UserError where the type is refused.

    `adapter` are keys of the recipe by which LoRA is added.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _measure(kind, recipe_in(Path(folder), **adapter))


def _measure(kind: str, recipe: Any) -> Row:
    model = small_model(kind)
    device, vocabulary = torch.device("cpu"), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(4, vocabulary, (n,), generator=generator) for n in LENGTHS]

    def logits_of(stock: Any, document: torch.Tensor) -> torch.Tensor:
        return stock(input_ids=document[None], use_cache=False).logits[0]

    def loss_of(logits: torch.Tensor, number: int) -> torch.Tensor:
        return cross_entropy(logits[:-1].float(), documents[number][1:], reduction="sum")

    try:
        alone = each_alone(model, documents, logits_of, loss_of)
    except Exception as error:
        raise NotSmall(f"its own backward: {type(error).__name__}: {error}") from error
    answering = copy.deepcopy(model)
    adapters = LoraCheck(copy.deepcopy(model), recipe, documents, logits_of, loss_of)
    form = install_causal(model, max_seq_length=64)
    padded = form.why_padded is not None
    found = check_isolation(model, vocabulary, device, torch.float32, padded=padded)
    inputs = packed_inputs(documents, device, positions=True)
    row = inputs["input_ids"][0]
    supervised = torch.ones_like(row, dtype=torch.bool)
    supervised[inputs["cu_seq_lens_q"][:-1].long()] = False
    places = supervised.nonzero()[:, 0]

    def loss_of_row(trained: Any) -> torch.Tensor:
        return trained(**inputs, supervised_positions=places - 1, targets=row[places]).loss

    with torch.no_grad():
        together = model(**inputs).logits[0].split(list(LENGTHS))
    loss = loss_of_row(model)
    loss.backward()
    gradient = largest_difference(gradients(model), alone.gradients)
    error = abs(float(loss.detach()) - alone.loss) / alone.loss
    lora = adapters.of(model, loss_of_row)
    try:
        alike, why = answered_alike(answering), ""
    except (UserError, RunFault) as refusal:
        alike, why = None, f"generation: {refusal}"
    notes = "; ".join(note for note in (form.why_padded, lora.why, why) if note)
    return Row(
        kind, "padded" if padded else "packed", notes, found["leak"],
        difference_of_logits(together, alone.logits), error, gradient, lora, alike,
    )  # fmt: skip


def entry(kind: str) -> str:
    """What the page says of a type: a row of the table, a refusal, or its name where no small model is built."""
    try:
        return measure(kind).line()
    except (UserError, RunFault) as error:
        return f"- `{kind}`: {error}"
    except NotSmall:
        return f"`{kind}`"


def table_of(page: str) -> dict[str, str]:
    """The entries of the page's table by type."""
    return entries_of(page[page.index(BEGIN) : page.index(END, page.index(BEGIN))])


def table(entries: dict[str, str]) -> str:
    """The causal part of docs/models.md."""
    ordered = [entries[kind] for kind in sorted(entries)]
    rows, refused, not_small = ([text for text in ordered if text[0] == first] for first in "|-`")
    packed = sum(row.split(" | ")[1] == "packed" for row in rows)
    head = (
        f"transformers {transformers.__version__}: {len(rows)} types train, {packed} of them packed and "
        f"{len(rows) - packed} padded; {len(refused)} are refused; {len(not_small)} do not build from a small "
        "configuration."
    )
    columns = ("type", "runs", "leak", "logits", "loss", "gradient", "LoRA", "export", "answers", "notes")
    titles = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    last = f"Not built from a small configuration: {', '.join(not_small)}."
    return "\n".join([BEGIN, head, "", *titles, *rows, "", "Refused:", "", *refused, "", last, END])


if __name__ == "__main__":  # with names of types, these alone are measured again
    transformers.logging.set_verbosity_error()
    entries = table_of(PAGE.read_text()) if sys.argv[1:] else {}
    with contextlib.redirect_stdout(sys.stderr):
        for kind in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            entries[kind] = entry(kind)
            print(entries[kind], file=sys.stderr, flush=True)
    page = PAGE.read_text()
    block = page[page.index(BEGIN) : page.index(END, page.index(BEGIN)) + len(END)]
    PAGE.write_text(page.replace(block, table(entries)))
