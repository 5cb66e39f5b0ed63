"""What an export writes is run by what will run it, and says the same as the model that was trained."""

import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tests.building import small_encoder, small_opt
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from isotune.checkpoint import export as exporting
from isotune.checkpoint.export import export_run
from isotune.cli import main
from isotune.data.sft.chat_format import ChatFormat
from isotune.io.errors import RunFault, UserError
from isotune.models.base.builtin import builtin_tokenizer

TEXTS = ["a fine meal", "never again, said the waiter who had waited for an hour", "so so"]


def run_of(folder: Path, model, tokenizer, **recipe) -> Path:
    """A finished run with this model, as training leaves it."""
    (folder / "model").mkdir(parents=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"tune": "full", "output_dir": str(folder), **recipe}))
    return folder


def classifier_run(folder: Path, kind: str, **recipe) -> Path:
    base = small_encoder(folder / "base", kind)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    rows = folder / "reviews.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": k % 3}) + "\n" for k, text in enumerate(TEXTS * 30)))
    data = {"dataset_name": str(rows), "eval_dataset_name": str(rows), "max_seq_length": 64}
    data |= {"task": "classification", "model_name_or_path": base}
    return run_of(folder / "run", model, AutoTokenizer.from_pretrained(base), **data, **recipe)


def session_of(folder: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


@torch.no_grad()
def alone(model, ids: list[int]) -> np.ndarray:
    return model.eval()(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def check_graph(folder: Path, model, tokenizer, *, pad: int) -> None:
    """Batches of other shapes than the traced one give what the stock model gives each row."""
    session = session_of(folder)
    assert all(isinstance(length, str) for given in session.get_inputs() for length in given.shape)
    for texts in (TEXTS, TEXTS[1:2]):
        rows = [tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        ids = np.array([[*row, *[pad] * (longest - len(row))] for row in rows])
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        names = {each.name for each in session.get_inputs()}
        (logits,) = session.run(["logits"], {name: given[name] for name in names})
        for row, found in zip(rows, logits, strict=True):
            np.testing.assert_allclose(found[: len(row)] if found.ndim == 2 else found, alone(model, row), atol=2e-5)


@pytest.mark.slow  # tracing a graph takes the exporter most of a minute of one core
def test_the_onnx_graph_of_a_classifier_gives_the_logits_of_the_stock_model_in_any_batch(tmp_path):
    run = classifier_run(tmp_path, "bert")
    done = export_run(run, merge=False, format="onnx")
    assert done.place == run / "export" / "model-onnx" / "model.onnx"
    stock = AutoModelForSequenceClassification.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    check_graph(done.folder, stock, tokenizer, pad=tokenizer.pad_token_id)
    assert AutoConfig.from_pretrained(done.folder).num_labels == 3
    found = done.measured
    assert (found.rows, found.runtime, found.parity.equal, found.parity.compared) == (64, "onnxruntime", 64, 64)
    assert found.source == str(tmp_path / "reviews.jsonl")
    assert 0 < found.parity.largest_difference < 1e-5


def language_run(folder: Path, kind: str) -> Path:
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    ChatFormat.of("guanaco", tokenizer).apply(tokenizer)
    if kind == "opt":
        base = small_opt(folder / "base")
    else:
        torch.manual_seed(2)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        size |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 128}
        LlamaForCausalLM(LlamaConfig(**size, bos_token_id=2, eos_token_id=2, pad_token_id=1)).save_pretrained(
            base := folder / "base"
        )
        tokenizer.save_pretrained(base)
    data = {"task": "sft", "model_name_or_path": str(base), "dataset_name": "builtin:greetings", "max_seq_length": 48}
    return run_of(folder / "run", AutoModelForCausalLM.from_pretrained(base), tokenizer, **data, chat_format="guanaco")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_the_onnx_graph_of_a_language_model_gives_the_logits_of_every_token(tmp_path, kind):
    run = language_run(tmp_path, kind)
    done = export_run(run, merge=False, format="onnx", output=tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(run / "model")
    check_graph(tmp_path / "out", stock, AutoTokenizer.from_pretrained(run / "model"), pad=1)
    assert done.measured.rows == 8 and done.measured.parity.compared > 100
    assert done.measured.parity.equal == done.measured.parity.compared


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilbert", "roberta", "albert", "deberta-v2", "electra"])
def test_the_onnx_graph_of_any_encoder_gives_the_logits_of_the_stock_model(tmp_path, kind):
    run = classifier_run(tmp_path, kind)
    done = export_run(run, merge=False, format="onnx", output=tmp_path / "out")
    stock = AutoModelForSequenceClassification.from_pretrained(run / "model")
    check_graph(done.folder, stock, AutoTokenizer.from_pretrained(done.folder), pad=1)
    assert done.measured.parity.equal == 64


@pytest.mark.slow
def test_a_decoder_that_classifies_reads_the_last_token_of_each_padded_row(tmp_path):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    torch.manual_seed(3)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=128, num_labels=3, pad_token_id=1)
    data = {"task": "classification", "dataset_name": "builtin:opinions", "max_seq_length": 64}
    run = run_of(tmp_path / "run", LlamaForSequenceClassification(config), tokenizer, **data, model_name_or_path="x")
    export_run(run, merge=False, format="onnx", output=tmp_path / "out")
    stock = AutoModelForSequenceClassification.from_pretrained(run / "model")
    check_graph(tmp_path / "out", stock, tokenizer, pad=1)


@pytest.mark.slow
def test_a_merged_adapter_in_bf16_becomes_a_graph_in_float32(tmp_path):
    run = language_run(tmp_path, "opt")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for file in (run / "model").glob("*.safetensors"):
        file.unlink()
    (run / "model" / "config.json").unlink()
    adapted.save_pretrained(run / "model")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"tune": "lora", "bf16": True, "r": 4}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="an adapter, which --format onnx cannot hold: add --merge"):
        export_run(run, merge=False, format="onnx")
    done = export_run(run, merge=True, format="onnx", output=tmp_path / "out")
    assert done.measured.parity.largest_difference < 1e-4 * done.measured.parity.largest_logit
    assert session_of(tmp_path / "out").get_outputs()[0].type == "tensor(float)"


@pytest.mark.parametrize(("format", "runtime"), [("safetensors", "transformers"), ("pt", "torch")])
def test_copied_weights_give_the_very_logits_on_the_run_s_own_rows(tmp_path, capsys, format, runtime):
    run = classifier_run(tmp_path, "bert")
    with pytest.raises(SystemExit) as left:
        main(["export", str(run), "--format", format])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("file: "))
    assert not left.value.code
    assert line.startswith(f"file: run by {runtime} on 64 rows of {tmp_path / 'reviews.jsonl'}: largest absolute logit")
    assert "difference 0 (" in line and line.endswith("likeliest class is the same at 64 of 64 places (100.0%)")


def test_rows_that_are_gone_are_replaced_and_that_is_said(tmp_path):
    run = classifier_run(tmp_path, "bert")
    (tmp_path / "reviews.jsonl").unlink()
    done = export_run(run, merge=False)
    assert done.measured.rows == 2
    assert done.measured.source.startswith("the program's own, as the run's data cannot be read (eval_dataset_name: ")


def test_a_file_that_says_something_else_is_refused_and_removed(tmp_path, monkeypatch):
    run, stock = classifier_run(tmp_path, "bert"), exporting.save_state_dict

    def spoilt(model, *others):
        model.classifier.bias.data[0] += 1.0
        stock(model, *others)

    monkeypatch.setattr(exporting, "save_state_dict", spoilt)
    with pytest.raises(RunFault, match=r"is not the model of .*run \(file: run by torch .* difference 1 \("):
        export_run(run, merge=False, format="pt", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_and_another_dtype_are_one_sentence_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the weights of an ONNX graph are float32"):
        export_run(tmp_path / "none", merge=True, format="onnx", dtype="float16")
    monkeypatch.setattr("isotune.io.extras.find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UserError, match=r"^--format onnx needs onnxruntime: pip install 'isotune\[export\]'$"):
        export_run(tmp_path / "none", merge=True, format="onnx")


def test_the_script_for_vllm_names_the_files_beside_it_wherever_they_are(tmp_path):
    run = language_run(tmp_path, "llama")
    done = export_run(run, merge=False, output=tmp_path / "out")
    assert done.servers[0] == f"vLLM        sh {tmp_path / 'out' / 'vllm.sh'}"
    assert done.servers[1] == f"Ollama      ollama create run -f {tmp_path / 'out' / 'Modelfile'}"
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM .\nTEMPLATE")
    (tmp_path / "out").rename(tmp_path / "moved here")
    (tmp_path / "vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "vllm").chmod(0o755)
    script = tmp_path / "moved here" / "vllm.sh"
    said = subprocess.run(["sh", script, "--port", "9"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True)
    folder = str(tmp_path / "moved here")
    assert said.stdout.decode().splitlines() == [
        *("serve", folder, "--served-model-name", "run", "--chat-template", f"{folder}/chat_template.jinja"),
        *("--generation-config", "vllm", "--port", "9"),
    ]
    template = (tmp_path / "moved here" / "chat_template.jinja").read_text()
    assert template == AutoTokenizer.from_pretrained(run / "model").chat_template


@pytest.mark.parametrize(
    ("settings", "recipe", "words"),
    [
        ({"r": 12}, {}, "--lora-modules run={here} --max-lora-rank 16"),
        ({}, {"tune": "qlora"}, "--max-lora-rank 8 --quantization bitsandbytes"),
        ({"use_dora": True}, {}, "vLLM serves no adapter with DoRA: export it with --merge"),
        ({"modules_to_save": ["lm_head"]}, {}, "vLLM serves no adapter with whole modules"),
        ({}, {"tune": "qlora", "bnb_4bit_quant_type": "fp4"}, "others were trained on"),
    ],
)
def test_the_script_for_vllm_loads_an_adapter_on_its_base_as_it_was_trained(tmp_path, settings, recipe, words):
    from isotune.checkpoint.formats.vllm import NotServed, vllm_script
    from isotune.models.finished_run import FinishedRun

    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **settings}))
    recipe = {"tune": "lora", "chat_format": "guanaco", **recipe}
    run = FinishedRun(tmp_path, recipe, tmp_path, "some/base", False, "abc123")
    try:
        said = " ".join(shlex.split(vllm_script(run, tmp_path, "run").splitlines()[-1]))
        assert said.startswith("exec vllm serve some/base --revision abc123 --tokenizer $here --enable-lora")
    except NotServed as why:
        said = str(why)
    assert words.replace("{here}", "$here") in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_has_the_weights_in_llama_cpp_s_order_and_reads_back_as_the_same_model(tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    run = language_run(tmp_path, "llama")
    stock = AutoModelForCausalLM.from_pretrained(run / "model", dtype=dtype)
    stock.save_pretrained(run / "model")
    done = export_run(run, merge=False, format="gguf")
    assert done.place == run / "export" / "model-gguf" / "model.gguf"
    assert done.measured.parity.largest_difference < 1e-5 and done.measured.rows == 8
    reader = gguf.GGUFReader(str(done.place))
    weights = {tensor.name: tensor for tensor in reader.tensors}
    state = stock.state_dict()
    # rows j and j + 4 of a head of 8, which turn together, lie side by side in llama.cpp's order
    for name, heads in (("q", 4), ("k", 2)):
        tensor = weights[f"blk.1.attn_{name}.weight"]
        assert tensor.tensor_type.name == ("F32" if dtype == torch.float32 else "BF16")
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        own = state[f"model.layers.1.self_attn.{name}_proj.weight"].float().numpy()
        for head in range(heads):
            for j in range(4):
                assert (found[8 * head + 2 * j] == own[8 * head + j]).all()
                assert (found[8 * head + 2 * j + 1] == own[8 * head + j + 4]).all()
    assert weights["output_norm.weight"].tensor_type.name == "F32"
    tokenizer = AutoTokenizer.from_pretrained(done.folder, gguf_file="model.gguf")
    text = "### Human: Where is the station?\n### Assistant: Über there, naïve one."
    own = AutoTokenizer.from_pretrained(run / "model")
    assert (
        tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        == own.backend_tokenizer.encode(text, add_special_tokens=False).ids
    )
    assert reader.get_field("tokenizer.chat_template").contents() == own.chat_template
    assert (done.folder / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


def test_a_gguf_file_of_a_published_llama_cuts_and_answers_as_its_own(tmp_path, shared_data):
    pytest.importorskip("gguf")
    stories = shared_data / "checkpoints" / "stories260K"
    own = AutoTokenizer.from_pretrained(stories)
    data = {"task": "sft", "model_name_or_path": str(stories), "dataset_name": "builtin:greetings"}
    run = run_of(tmp_path / "run", AutoModelForCausalLM.from_pretrained(stories), own, **data)
    done = export_run(run, merge=False, format="gguf")
    assert done.measured.parity.largest_difference < 1e-5
    read = AutoTokenizer.from_pretrained(done.folder, gguf_file="model.gguf")
    for text in ("Once upon a time, there was a girl.", "Zoë's cat sat\n  on 3 mats: 世界 🙂."):
        cut = [one.backend_tokenizer.encode(text, add_special_tokens=False).ids for one in (own, read)]
        assert cut[0] == cut[1]


def test_what_gguf_cannot_hold_here_is_one_sentence_with_the_way_by_llama_cpp(tmp_path, shared_data):
    run = language_run(tmp_path, "opt")
    way = rf"give the folder of `isotune export {run}` to llama.cpp's convert_hf_to_gguf\.py$"
    with pytest.raises(UserError, match=rf"^--format gguf: a model of the type 'opt' is not written here .*: {way}"):
        export_run(run, merge=False, format="gguf")
    other = tmp_path / "stories"
    stories = AutoModelForCausalLM.from_pretrained(shared_data / "checkpoints" / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "checkpoints" / "stories260K")
    data = {"task": "sft", "model_name_or_path": "stories", "dataset_name": "builtin:greetings"}
    run_of(other, stories, tokenizer, **data)
    stories.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    stories.save_pretrained(other / "model")
    with pytest.raises(UserError, match="rotary embeddings of the kind 'linear'"):
        export_run(other, merge=False, format="gguf")
    assert not list((other / "export").glob("*")) and not (run / "export").exists()
    classifier = classifier_run(tmp_path / "c", "bert")
    with pytest.raises(UserError, match="the run of a classifier: --format gguf is for language models"):
        export_run(classifier, merge=False, format="gguf")
