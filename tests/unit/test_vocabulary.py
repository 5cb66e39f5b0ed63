"""New tokens get rows of the embedding and the head: begun alike everywhere, trained, saved, merged, generated."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.building import build, build_classifier, small_encoder, small_opt
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, LlamaConfig, LlamaForCausalLM, OPTConfig

from isotune.checkpoint.export import export_run
from isotune.evaluation.models import generation_model_of_run
from isotune.io.errors import UserError
from isotune.models.base import vocabulary
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.base.vocabulary import grow_embeddings, new_rows
from isotune.models.opening import load_pretrained_tokenizer
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.request import read_preflight_request
from isotune.training.from_recipe import save

NEW = ["<|question|>", "<|answer|>"]
ROWS = len(builtin_tokenizer("builtin:opt-tiny"))


def rows_file(folder, tokens=NEW):
    """Conversations in which the new tokens occur."""
    file = folder / "rows.jsonl"
    texts = [f"### Human: {tokens[0]} {n} and {n}?### Assistant: {tokens[1]} It is {2 * n}." for n in range(40)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def llama(folder, spare=0):
    """A model whose head is not its embedding."""
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=ROWS + spare, **sizes, bos_token_id=2, eos_token_id=2, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_begin_as_the_mean_of_the_others(tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(small_opt(tmp_path / "opt") if tied else llama(tmp_path / "llama"))
    before = [layer.weight.detach().double() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    grow_embeddings(model, [ROWS, ROWS + 1])
    for old, layer in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert layer.weight.shape[0] == ROWS + 2 == model.config.vocab_size
        assert torch.equal(layer.weight[:ROWS].double(), old)
        assert torch.allclose(layer.weight[ROWS:].double(), old.mean(0).expand(2, -1), rtol=0, atol=1e-7)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_a_row_to_spare_is_taken_and_begins_anew(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama(tmp_path, spare=8))
    old = model.lm_head.weight.detach().clone()
    grow_embeddings(model, [ROWS])
    others = torch.cat([old[:ROWS], old[ROWS + 1 :]])
    assert model.lm_head.weight.shape[0] == ROWS + 8
    assert torch.allclose(model.lm_head.weight[ROWS], others.mean(0), atol=1e-7)
    assert torch.equal(model.lm_head.weight[ROWS + 1 :], old[ROWS + 1 :])


@pytest.mark.parametrize(
    ("tune", "make"),
    [
        pytest.param("lora", small_opt, id="lora-tied"),
        pytest.param("full", llama, id="full-untied"),
        pytest.param("lora", llama, id="lora-untied", marks=pytest.mark.slow),
        pytest.param("full", small_opt, id="full-tied", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_them_saves_them_merges_them_and_generates_with_them(tmp_path, capsys, make, tune):
    base = make(tmp_path / "base")
    values = {"model_name_or_path": base, "dataset_name": rows_file(tmp_path), "tune": tune, "learning_rate": 1e-2}
    built = build(tmp_path, **values, add_tokens=NEW, save_steps=6)
    assert "tokens      2 new" in capsys.readouterr().out
    begun = built.trainer.model.get_input_embeddings().weight.detach().clone()
    losses = [line["loss"] for line in built.train() if "loss" in line]
    assert losses[-1] < losses[0]
    now = built.trainer.model.get_input_embeddings().weight.detach()
    moved = (now - begun).abs().amax(dim=1) > 0
    assert moved[ROWS:].all()
    if tune == "lora":
        assert not moved[:ROWS].any(), "rows of the base are frozen"
    assert save(built.start, built.trainer) is not None
    tokenizer = AutoTokenizer.from_pretrained(built.run.model)
    ids = tokenizer(f"{NEW[0]} 3 and 3?", return_tensors="pt").input_ids
    assert ROWS in ids[0].tolist()
    with torch.no_grad():
        trained = built.trainer.model.eval()(input_ids=ids, use_cache=False).logits
    for source in (built.run.path, built.run.path / "checkpoints" / "step-00000006"):
        done = export_run(source, merge=True, output=tmp_path / "exported" / source.name)
        merged = AutoModelForCausalLM.from_pretrained(done.folder)
        assert (done.parity is None) == (tune == "full")
        assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == ROWS + 2
        with torch.no_grad():
            assert (merged(ids).logits - trained).abs().max() < 1e-5 * trained.abs().max()
    loaded = generation_model_of_run(built.run.path, torch.device("cpu"))
    with torch.no_grad():
        assert (loaded.model(ids).logits - trained).abs().max() < 1e-5 * trained.abs().max()
        assert loaded.model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    if tune == "lora":
        held = load_file(built.run.model / "adapter_model.safetensors")
        rows = {name: tensor.shape for name, tensor in held.items() if "lora_" not in name}
        assert len(rows) == (1 if make is small_opt else 2) and {shape[0] for shape in rows.values()} == {2}


def test_the_gradient_of_a_new_row_is_that_of_the_whole_embedding_trained(tmp_path):
    """Full training of the same model is the reference: no code of peft's."""
    base, gradients = llama(tmp_path / "base"), []
    for tune in ("full", "lora"):
        values = {"model_name_or_path": base, "dataset_name": rows_file(tmp_path), "tune": tune}
        values |= {"lora_dropout": 0.0} if tune == "lora" else {}
        built = build(tmp_path / tune, **values, add_tokens=NEW)
        built.trainer.training_step(built.model, next(iter(built.trainer.get_train_dataloader())))
        vocabulary = [
            p.grad
            for name, p in built.model.named_parameters()
            if p.grad is not None and "lora_" not in name and ("embed" in name or "lm_head" in name)
        ]
        gradients.append([g[ROWS:] for g in vocabulary] if tune == "full" else vocabulary)
    assert [len(found) for found in gradients] == [2, 2]
    for expected, found in zip(*(sorted(own, key=lambda g: float(g.norm())) for own in gradients), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_classifier_gets_them_too(tmp_path):
    base = small_encoder(tmp_path / "bert", "bert")
    built = build_classifier(tmp_path, model_name_or_path=base, tune="lora", add_tokens=["good"], learning_rate=1e-2)
    losses = [line["loss"] for line in built.train() if "loss" in line]
    assert all(loss == loss for loss in losses)
    assert save(built.start, built.trainer) is not None
    done = export_run(built.run.path, merge=True)
    assert done.parity is not None and done.parity.largest_difference < 1e-5 * done.parity.largest_logit


def too_large_a_tokenizer(folder):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    tokenizer.add_tokens(["<|more|>", "<|and more|>"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tokens_without_rows_are_refused_before_anything_is_read_unless_rows_are_asked_for(tmp_path):
    base, other = small_opt(tmp_path / "base"), too_large_a_tokenizer(tmp_path / "tokenizer")
    values = {"model_name_or_path": base, "tokenizer_name_or_path": other, "dataset_name": str(tmp_path / "none.jsonl")}
    with pytest.raises(UserError, match=r"one of the last 2 tokens cannot be read; .* resize_embeddings: true"):
        build(tmp_path, **values)
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    asked = ["--task", "sft", "--output_dir", str(tmp_path / "run"), "--max_seq_length", "64", *flags]
    with pytest.raises(UserError, match="resize_embeddings: true"):
        run_preflight(read_preflight_request(None, asked, None, None), show_progress=False)
    more = read_preflight_request(None, [*asked, "--resize_embeddings", "true"], None, None)
    assert run_preflight(more, show_progress=False).model.trained_numel > 2 * 32
    values["dataset_name"] = rows_file(tmp_path)
    built = build(tmp_path, **values, tune="lora", resize_embeddings=True)
    assert built.start.new_rows == (ROWS, ROWS + 1)
    assert built.trainer.model.get_input_embeddings().weight.shape[0] == ROWS + 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"add_tokens": ["<pad>"]}, "add_tokens names '<pad>', which the tokenizer has: take it out"),
        ({"add_tokens": ["<a>"], "tune": "lora", "peft_type": "ia3"}, "say peft_type: lora"),
        ({"add_tokens": ["<a>"], "tune": "lora", "modules_to_save": ["embed_tokens"]}, "whose new rows are trained"),
    ],
    ids=str,
)
def test_what_cannot_be_added_is_refused(tmp_path, values, says):
    with pytest.raises(UserError, match=says):
        build(tmp_path, model_name_or_path=small_opt(tmp_path / "base"), **values)


def test_a_head_with_a_bias_is_refused_beside_adapters(tmp_path):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    config = GPTJConfig(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=2, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    with pytest.raises(UserError, match="has a bias, which peft's trainable tokens leave out: say tune: full"):
        build(tmp_path, model_name_or_path=str(tmp_path / "gptj"), tune="lora", add_tokens=["<a>"])


def test_the_ids_of_new_rows(tmp_path):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    tokenizer.add_tokens("<a>")

    class Asked:
        add_tokens, resize_embeddings, model_name_or_path = ("<a>",), False, "m"

    assert new_rows(OPTConfig(vocab_size=ROWS), tokenizer, Asked) == (ROWS,)
    assert new_rows(OPTConfig(vocab_size=ROWS + 64), tokenizer, Asked) == (ROWS,)
    with pytest.raises(UserError, match="one of the last 2 tokens"):
        new_rows(OPTConfig(vocab_size=ROWS - 1), tokenizer, Asked)
    Asked.resize_embeddings = True
    assert new_rows(OPTConfig(vocab_size=ROWS - 1), tokenizer, Asked) == (ROWS - 1, ROWS)


def test_new_tokens_that_no_document_has_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vocabulary, "TOKENS_AT_ONCE", 7)
    values = {"tune": "lora", "dataset_name": rows_file(tmp_path), "max_steps": 1}
    build(tmp_path, **values, model_name_or_path=small_opt(tmp_path / "base"), add_tokens=[*NEW, "<|never|>"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no effect")]
    assert said == ["no effect   no document has '<|never|>' of add_tokens: nothing is learnt of it"]


def test_a_tokenizer_file_that_is_broken_is_one_sentence(tmp_path):
    """JSON that holds no tokenizer: the library raises Exception itself for it."""
    builtin_tokenizer("builtin:bert-tiny").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"version"', '"verzion"', 1).replace('"type"', '"tipe"', 1))
    with pytest.raises(UserError, match=f"the tokenizer of '{tmp_path}' cannot be loaded: "):
        load_pretrained_tokenizer(str(tmp_path))
