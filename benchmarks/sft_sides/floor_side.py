"""The matrix products of a step and nothing else, in bf16, on weights and activations of their own.

`floor_linear` multiplies by every linear layer forward and for the gradient of its input, in full tuning also for that
of its weight; by the head at supervised positions only. `floor` adds the two other kinds of product that no trainer
can leave out: the adapters', and attention's six within each document, a causal block of queries at a time. It counts
nothing but products, and no product twice.
"""

import itertools
import math
import time
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from isotune.models.adapters.targets import DEFAULT_TARGETS
from sft_sides.inner_products import AdapterProducts, AttentionProducts, random
from sft_sides.material import ROW_TOKENS, geometry, rows_of_a_round, shipped_recipe
from sft_sides.process import Metronome

# Dense bf16 FLOP/s of the data sheets; other devices are measured.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def run(metronome: Metronome, side: str, mode: str, given: Namespace, scratch: str) -> None:
    """Multiply until the metronome ends it; its facts are the FLOPs of a round, with and without attention."""
    recipe = shipped_recipe(mode, side, given, scratch)
    _, data, _ = rows_of_a_round(recipe, given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = geometry(given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    inner = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights = [random(module.weight.shape, device).mul_(0.02) for module in inner]
    head_weight = random(head.weight.shape, device).mul_(0.02)
    tokens = given.rows_per_pass * ROW_TOKENS
    sizes = {size for weight in (*weights, head_weight) for size in weight.shape}
    activations = {size: random((tokens, size), device) for size in sizes}
    results = {size: torch.empty_like(tensor) for size, tensor in activations.items()}
    gradients = {shape: torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in
                 {weight.shape for weight in (*weights, head_weight) if mode == "full"}}  # fmt: skip

    counts = data.documents.supervised_counts
    per_row = [int(counts[data.rows[row]].sum()) for row in range(len(data.rows))]
    supervised = [sum(per_row[i : i + given.rows_per_pass]) for i in range(0, len(per_row), given.rows_per_pass)]

    def multiply(weight: torch.Tensor, positions: int) -> None:
        outputs, inputs = weight.shape
        x, upstream = activations[inputs][:positions], activations[outputs][:positions]
        torch.mm(x, weight.t(), out=results[outputs][:positions])
        torch.mm(upstream, weight, out=results[inputs][:positions])
        if mode == "full":
            torch.mm(upstream.t(), x, out=gradients[weight.shape])

    def facts() -> dict[str, Any]:
        parameters = len(supervised) * tokens * sum(w.numel() for w in weights) + sum(supervised) * head_weight.numel()
        products = parameters * (6 if mode == "full" else 4)
        # Scores and sums of values, causal and within documents: 2 n^2 d forward in each layer, twice that backward.
        squares = float((data.documents.lengths[data.rows.documents].astype(float) ** 2).sum())
        attention = 6 * squares * config.hidden_size * config.num_hidden_layers
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        peak, source = peak_flops(name) if device.type == "cuda" else (None, None)
        return {"product_flops": products, "model_flops": products + attention, "device": name,
                "peak_flops_per_second": peak, "peak_source": source}  # fmt: skip

    adapters, attention = None, []
    if side == "floor":
        starts = range(0, len(data.rows), given.rows_per_pass)
        by_pass = [np.concatenate([data.rows[row] for row in range(i, i + given.rows_per_pass)]) for i in starts]
        attention = [AttentionProducts(config, data.documents.lengths[of].tolist(), device) for of in by_pass]
        if mode == "lora":
            targets = recipe.target_modules or DEFAULT_TARGETS["opt"]
            shapes = [m.weight.shape for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in targets]
            adapters = AdapterProducts(shapes, recipe.r, tokens, device)

    passes = given.rows_per_step // given.rows_per_pass
    for done in itertools.count():
        if done % passes == 0:
            metronome.beat(facts)
        for weight in weights:
            multiply(weight, tokens)
        multiply(head_weight, supervised[done % len(supervised)])
        if adapters:
            adapters.multiply()
        if attention:
            attention[done % len(attention)].multiply()


def peak_flops(device_name: str) -> tuple[float, str]:
    """The bf16 FLOP/s of this CUDA device, by its data sheet or else by a large product; and which of them."""
    for known, peak in PEAK_FLOPS.items():
        if known in device_name:
            return peak, "data sheet"
    square = random((8192, 8192), torch.device("cuda"))
    best = math.inf
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(square, square)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * 8192**3 / best, "product of 8192 x 8192"
