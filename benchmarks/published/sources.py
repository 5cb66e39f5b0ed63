"""What the sources of published figures say of how they were measured, and why some rows cannot be planned.

Nothing here is fitted. A setting that a table leaves out is taken from the configuration beside it in its repository.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, str]


@dataclass(frozen=True)
class Settings:
    """How a row was measured."""

    seq_len: int
    rows: int = 1  # of a microbatch
    accumulation: int = 1
    recompute: float = 0.0  # share of the blocks' products that are computed again in backward
    fused: bool = False  # torch.compile, or kernels that fuse element-wise operations
    per_node: int = 8
    network_bytes_per_second: float | None = None  # of a GPU, where the source says it
    # bytes of a trained parameter: weight, gradient and optimizer; None where memory is not compared
    state_bytes: tuple[float, float, float] | None = None
    no_memory: str = "the optimizer's and the weights' types are not stated"  # why memory is not compared


class Unexplained(Exception):
    """Why a row cannot be planned: one sentence."""


_GIGABIT = 1e9 / 8
_BF16, _EIGHT_BIT = (2.0, 2.0, 4.0), 2.03
_COMPILED = "activations that compiled blocks compute again, which isotune keeps"


def settings_of(row: Row) -> Settings:
    """The settings of a row; Unexplained where the plan has no form for what was measured."""
    if not row["tokens_per_second_per_device"] and not row["peak_memory_gib"]:
        raise Unexplained("neither tokens/s of a GPU nor GiB is printed")
    if re.search("fp8|float8", row["precision"], re.IGNORECASE):
        raise Unexplained("8-bit products: isotune trains in 16 bits")
    if re.search(r"tp ?=?[2-9]|pp [2-9]", row["engine"], re.IGNORECASE):
        raise Unexplained("tensor or pipeline parallelism, which isotune does not have")
    if not row["device"]:
        raise Unexplained("the device is not stated")
    for name, read in _SOURCES.items():
        if row["source"].startswith(name):
            return read(row)
    raise Unexplained("the source's settings are not known")


def _llm_foundry(row: Row) -> Settings:
    rows, accumulation = re.findall(r"microbatch (\d+) rows, grad accumulation (\d+)", row["notes"])[0]
    recompute = float("activation checkpointing True" in row["notes"])
    # 1,600 Gb/s of a node where it is stated, for the A100
    network = 1600 / 8 * _GIGABIT if "1600 Gbps" in row["notes"] else None
    return Settings(int(row["seq_len"]), int(rows), int(accumulation), recompute, network_bytes_per_second=network)


def _flash_attention(row: Row) -> Settings:
    total = 2**19 if "'0.5M'" in row["notes"] else 2**20
    return Settings(2048, 16, max(1, total // (8 * 16 * 2048)), fused=True)


def _kempner(row: Row) -> Settings:
    # batch_size 4, and 2 (7B) or 4 (13B) microbatches a step; four GPUs a node
    accumulation = int(row["global_batch_tokens"]) // int(row["num_devices"]) // (4 * 4096)
    return Settings(4096, 4, accumulation, 1.0, fused="compile off" not in row["notes"], per_node=4)


def _torchtitan(row: Row) -> Settings:
    rows = int(re.findall(r"local batch (\d)", row["notes"])[0])
    recompute = 1.0 if "full AC" in row["notes"] else 0.5  # selective: every second product is computed again
    why = "selective recomputation and all logits at once, which isotune does not have"
    return Settings(8192, rows, 1, recompute, "compile" in row["notes"].split("MFU")[0], no_memory=why)


def _fms_fsdp(row: Row) -> Settings:
    network = float(re.findall(r"(\d+)Gbps", row["notes"])[0]) / 8 * _GIGABIT
    recompute = 0.5 if "selective AC" in row["notes"] else 0.0
    return Settings(4096, 2, 1, recompute, fused=True, network_bytes_per_second=network)


def _torchtune(row: Row) -> Settings:
    notes = row["notes"]
    if "baseline" in notes:
        raise Unexplained("rows are padded, to lengths that are not stated")
    if "70B" in row["model"] and row["tune"] == "full":
        raise Unexplained("weights in host memory, and tokens/s of one GPU or of all is not said")
    base = Settings(int(row["seq_len"]), 2, fused=True, state_bytes=_BF16)
    if "8B" in row["model"] or "70B" in row["model"]:
        # the recipes of the release: 8-bit AdamW within backward, chunked loss, blocks recomputed in full tuning; LoRA
        # on the RTX 4090 cannot keep what it keeps on the larger card
        if row["tune"] == "full":
            # the pages of the 8-bit state leave a card that is too small for them
            paged = 0.0 if "4090" in row["device"] else _EIGHT_BIT
            return replace(base, recompute=1.0, state_bytes=(2.0, 0.0, paged))
        if "A6000" in row["device"]:
            return replace(base, state_bytes=None, no_memory=_COMPILED)
        return replace(base, recompute=1.0)
    techniques = ["+ packed", "+ compile", "chunked", "activation checkpointing", "optimizer in backward", "offloading",
                  "8-bit", "LoRA", "QLoRA"]  # fmt: skip
    done = max(number for number, name in enumerate(techniques) if name in notes.split(";")[0])
    state = _BF16
    if 4 <= done <= 6:
        state = (2.0, 0.0, 4.0 if done < 6 else _EIGHT_BIT)
    settings = replace(base, fused=done >= 1, recompute=float(done >= 3), state_bytes=state)
    if done < 2:
        return replace(settings, state_bytes=None, no_memory="all logits at once, which isotune does not have")
    if done == 2:
        return replace(settings, state_bytes=None, no_memory=_COMPILED)
    if done >= 5:
        return replace(settings, state_bytes=None, no_memory="activations in host memory, which isotune does not have")
    return settings


def _automodel(row: Row) -> Settings:
    return Settings(4096, 2, 16 // int(row["num_devices"]), fused=True)


def _vectorlm(row: Row) -> Settings:
    # profiling/configs: 8 rows, 4 microbatches, recomputation
    return Settings(2048, 8, 4, 1.0)


def _llama_factory(row: Row) -> Settings:
    return Settings(int(row["seq_len"]), 1, 4, 1.0)


def _prime_rl(row: Row) -> Settings:
    # benchmarks/scripts/run_single_benchmark.py: --model.compile, --model.ac, two microbatches of a row
    why = "all logits at once, which isotune does not have"
    return Settings(int(row["seq_len"]), 1, 2, 1.0, fused=True, no_memory=why)


def _never(why: str) -> Any:
    def refuse(row: Row) -> Settings:
        raise Unexplained(why)

    return refuse


_SOURCES = {
    "mosaicml/llm-foundry": _llm_foundry,
    "Dao-AILab/flash-attention": _flash_attention,
    "KempnerInstitute/KempnerForge": _kempner,
    "pytorch/torchtitan": _torchtitan,
    "foundation-model-stack/fms-fsdp": _fms_fsdp,
    "pytorch/torchtune": _torchtune,
    "NVIDIA-NeMo/Automodel": _automodel,
    "VectorInstitute/vectorlm": _vectorlm,
    "hiyouga/LLaMA-Factory": _llama_factory,
    "PrimeIntellect-ai/prime-rl": _prime_rl,
    "deepspeedai/DeepSpeed": _never("the rows of a microbatch of BERT's pretraining are not stated"),
    "axolotl-ai-cloud/axolotl": _never("a mixture of experts in 4 bits, whose kernels are not stated"),
    "huggingface/picotron": _never("tokens/s are not printed"),
}
