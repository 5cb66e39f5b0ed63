"""An exported classifier predicts what the trained one did, from the run or from its checkpoint, in every format."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from tests.building import build_classifier, small_encoder
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from isotune.checkpoint.export import export_run
from isotune.io.errors import UserError
from isotune.training.from_recipe import save

RUNS = {
    "bert": {"tune": "full"},
    "bert_lora": {"tune": "lora"},
    "roberta_lora": {"tune": "lora", "r": 4, "lora_alpha": 12},
    "distilbert": {"tune": "full"},
}
TEXTS = ["a fine meal, and a slow waiter", "never again"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOTUNE_CACHE", str(folder / "cache"))
        for name, values in RUNS.items():
            kind = name.removesuffix("_lora")
            model = "builtin:bert-tiny" if kind == "bert" else small_encoder(folder / f"{name}-base", kind)
            values = {"model_name_or_path": model, "max_steps": 2, "save_steps": 2, "learning_rate": 1e-2, **values}
            built = build_classifier(folder / name, eval_dataset_name=None, **values)
            built.trainer.train()
            save(built.start, built.trainer)
            path = built.run.path
            found[name] = SimpleNamespace(
                path=path,
                checkpoint=path / "checkpoints" / "step-00000002",
                base=model,
                state={n: p.detach().clone() for n, p in built.trainer.model.state_dict().items()},
                logits=logits(built.trainer.model, built.tokenizer),
            )
    return found


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    """Logits of TEXTS, float32 [2, classes], each text alone by the model's plain forward."""
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    return torch.cat([model.eval()(input_ids=one).logits for one in ids])


def load(folder, format):
    if format == "safetensors":
        return AutoModelForSequenceClassification.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
    return model


@pytest.mark.parametrize("format", ["safetensors", "pt"])
@pytest.mark.parametrize("what", ["path", "checkpoint"])
@pytest.mark.parametrize("name", RUNS)
def test_the_exported_classifier_gives_the_logits_of_the_trained_one(runs, tmp_path, name, what, format):
    run = runs[name]
    done = export_run(getattr(run, what), merge=name.endswith("lora"), format=format, output=tmp_path / "out")
    model = load(tmp_path / "out", format)
    assert model.num_labels == 3
    found = logits(model, AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert torch.allclose(found, run.logits, atol=1e-5)
    assert (done.parity is not None) == name.endswith("lora")
    if name.endswith("lora"):
        head = {n: t for n, t in run.state.items() if ".classifier.modules_to_save." in n}
        assert head
        for long, tensor in head.items():
            short = long.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            assert torch.equal(model.state_dict()[short], tensor)
    else:
        assert all(torch.equal(model.state_dict()[n], t) for n, t in run.state.items())


def test_merging_adds_what_the_adapter_holds_and_changes_nothing_else(runs, tmp_path):
    run = runs["roberta_lora"]
    export_run(run.path, merge=True, output=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(f"{run.base}/model.safetensors")
    adapter = load_file(run.path / "model" / "adapter_model.safetensors")
    touched = set()
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            target = name.removeprefix("base_model.model.roberta.").replace("lora_A.weight", "weight")
            b = adapter[name.replace("lora_A", "lora_B")]
            wanted = base[target].double() + 12 / 4 * b.double() @ a.double()
            assert torch.allclose(found[f"roberta.{target}"].double(), wanted, rtol=1e-6, atol=1e-6)
            touched.add(target)
    assert len(touched) == 2 * 6
    kept = {n for n in base if n not in touched and f"roberta.{n}" in found}
    assert kept and all(torch.equal(found[f"roberta.{n}"], base[n]) for n in kept)


def test_an_adapter_without_its_head_is_refused_in_one_sentence(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["roberta_lora"].path, run)
    file = run / "model" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "lora_" in n}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"adapter_model.safetensors has no classification head \(classifier\)"):
        export_run(run, merge=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_merge_the_adapter_of_a_checkpoint_finds_its_base(runs, tmp_path):
    run = runs["bert_lora"]
    export_run(run.checkpoint, merge=False, output=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    found = logits(model, AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert torch.allclose(found, run.logits, atol=1e-5)
