"""A classifier on 4-bit weights and in bf16: the base lies as asked, the head is trained, and it learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tests.building import build_classifier, small_encoder
from transformers import BitsAndBytesConfig

from isotune.data.sources.source import find_corpus
from isotune.training.from_recipe import save

# multiples of bitsandbytes' block of 64, without which its own inference on CPU fails
GEOMETRY = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
RECIPE: dict[str, Any] = {"max_steps": 40, "learning_rate": 5e-3, "warmup_steps": 4, "global_batch_size": 16}
RECIPE |= {"microbatch_tokens": 16 * 64}  # a step in one forward: some processors emulate bf16
RECIPE |= {"bf16": True, "eval_dataset_name": "builtin:opinions", "eval_dataset_split": "test", "save_strategy": "no"}


def sixteen_opinions(folder: Path) -> str:
    """One step's rows. A random encoder of which only adapters learn can get them by heart, and little more."""
    rows = list(find_corpus("builtin:opinions").rows("train"))[:16]
    (folder / "opinions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "opinions.jsonl")


@pytest.mark.parametrize("steps", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_a_classifier_learns_on_4_bit_weights_and_loads_again_with_its_trained_head(tmp_path, steps):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = small_encoder(tmp_path / "bert", "bert", **GEOMETRY)
    built = build_classifier(
        tmp_path,
        model_name_or_path=model,
        dataset_name=sixteen_opinions(tmp_path),
        tune="qlora",
        lora_dropout=0.0,
        r=8,
        **RECIPE | {"max_steps": steps},
    )
    four_bit = [name for name, m in built.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert four_bit and not any("classifier" in name or "pooler" in name for name in four_bit)
    before = built.model.get_submodule("base_model.model.classifier").modules_to_save["default"].weight.detach().clone()
    lines = built.train()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps and losses[0] > 1.0
    assert steps < 40 or losses[-1] < 0.1
    save(built.start, built.trainer)
    in_effect = json.loads((built.run.path / "environment.json").read_text())["in_effect"]
    assert (in_effect["precision"], in_effect["exact_gradients"]) == ("bf16", True)
    saved = load_file(built.run.model / "adapter_model.safetensors")
    (head,) = [tensor for name, tensor in saved.items() if name.endswith("classifier.weight")]
    assert not torch.equal(head.float(), before.float())
    adapters = [tensor for name, tensor in saved.items() if "lora_B" in name]  # they begin at zero
    assert len(adapters) == len(four_bit) and all(tensor.any() for tensor in adapters)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(
        str(built.run.model),
        num_labels=3,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["bert.pooler", "classifier"],
        ),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    ).eval()
    last = [json.loads(line) for line in (built.run.path / f"eval/step-{steps:08d}/predictions.jsonl").open()]
    rows = find_corpus("builtin:opinions").rows("test")
    for line, row in list(zip(last, rows, strict=True))[:20]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inputs = built.tokenizer(row["text"], truncation=True, max_length=64, return_tensors="pt")
            shares = loaded(**inputs).logits.float().softmax(dim=1)[0]
        assert shares.tolist() == pytest.approx(line["probabilities"], abs=0.05)


@pytest.mark.slow
def test_a_classifier_learns_in_bf16_and_is_saved_in_fp32(tmp_path):
    model = small_encoder(tmp_path / "bert", "bert", **GEOMETRY)
    rows = sixteen_opinions(tmp_path)
    built = build_classifier(tmp_path, model_name_or_path=model, dataset_name=rows, tune="full", **RECIPE)
    losses = [line["loss"] for line in built.train() if "loss" in line]
    assert losses[0] > 1.0 and losses[-1] < 0.1
    report = save(built.start, built.trainer)
    assert report is not None and report.kind == "model"
    assert {tensor.dtype for tensor in load_file(built.run.model / "model.safetensors").values()} == {torch.float32}
