"""A model's card says what its run did, in figures of the run's own files, and its code loads the model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tests.building import build, build_classifier

from isotune.report.model_card import final_evaluation, write_model_card
from isotune.report.run_record import read_record
from isotune.run.step_lines import StepLines
from isotune.training.from_recipe import save

KINDS = ("classifier", "causal_lora")
KINDS += tuple(pytest.param(kind, marks=pytest.mark.slow) for kind in ("classifier_lora", "causal"))
METRICS = {"accuracy": "eval_accuracy", "loss": "eval_loss", "perplexity": "eval_perplexity", "f1": "eval_f1_macro"}


class Runs(dict[str, SimpleNamespace]):
    """A run of each kind with its card, trained where it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, kind: str) -> SimpleNamespace:
        tune = "lora" if kind.endswith("lora") else "full"
        values = {"tune": tune, "max_steps": 2, "eval_steps": 1, "save_strategy": "no"}
        if kind.startswith("classifier"):
            built = build_classifier(self.folder / kind, **values)
        else:
            built = build(self.folder / kind, eval_dataset_name="builtin:greetings", **values)
        built.trainer.train()
        save(built.start, built.trainer)
        card = write_model_card(built.run.path)
        self[kind] = SimpleNamespace(built=built, card=ModelCard.load(card), text=card.read_text())
        return self[kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("cards"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_results_of_the_card_are_the_last_evaluation_of_metrics_jsonl(runs, kind):
    run = runs[kind]
    line = [line for line in run.built.lines if "eval_loss" in line][-1]
    assert line["step"] == 2
    results = {result.metric_type: result for result in run.card.data.eval_results}
    assert {"loss", "accuracy" if kind.startswith("classifier") else "perplexity"} <= set(results)
    for name, result in results.items():
        assert result.metric_value == line[METRICS[name]]
        assert result.dataset_split == "test"
    assert run.card.data.model_name == "run"
    # the Hub reads this form of it
    (index,) = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", run.text, re.DOTALL)[1])["model-index"]
    assert {m["type"]: m["value"] for m in index["results"][0]["metrics"]} == {
        name: result.metric_value for name, result in results.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_say_what_the_model_is(runs, kind):
    data = runs[kind].card.data
    assert data.library_name == ("peft" if kind.endswith("lora") else "transformers")
    assert data.pipeline_tag == ("text-classification" if kind.startswith("classifier") else "text-generation")
    assert data.base_model is None and data.datasets is None  # none of them is on the Hub


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_lines_of_the_card_load_the_trained_model(runs, kind):
    run = runs[kind]
    (code,) = re.findall(r"```python\n(.*?)```", run.text, re.DOTALL)
    assert len(code.splitlines()) == 3
    names: dict = {}
    exec(code, names)
    ids = torch.tensor([names["tokenizer"]("a fine meal, and a slow waiter")["input_ids"]])
    trained = run.built.trainer.model.eval()
    with torch.no_grad():
        loaded = names["model"].eval()(input_ids=ids).logits
        in_memory = trained(input_ids=ids).logits
    assert loaded.shape == in_memory.shape
    assert torch.allclose(loaded, in_memory, atol=1e-5)


def loaded_by_the_card_of_qlora(of, run) -> torch.nn.Module:
    """The model that the card of a run with LoRA would load, had the run been one with QLoRA."""
    shutil.copytree(of.built.run.path, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "tune": "qlora", "bf16": True}))
    (code,) = re.findall(r"```python\n(.*?)```", write_model_card(run).read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names["model"]


def test_the_card_of_a_qlora_classifier_leaves_its_head_whole_as_training_does(runs, tmp_path):
    from bitsandbytes.nn import Linear4bit

    model = loaded_by_the_card_of_qlora(runs["classifier_lora"], tmp_path / "run")
    four_bit = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert four_bit and not [name for name in four_bit if "pooler" in name or "classifier" in name]


def test_the_card_of_a_qlora_run_loads_the_base_in_four_bits(runs, tmp_path):
    model = loaded_by_the_card_of_qlora(runs["causal_lora"], tmp_path / "run")
    kept = model.get_base_model().config.quantization_config
    assert (kept.load_in_4bit, kept.bnb_4bit_quant_type, kept.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert kept.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_of_the_text_are_those_of_the_files(runs, kind):
    run = runs[kind]
    steps = run.built.steps
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", run.text, re.MULTILINE))
    assert facts["input tokens"] == f"{sum(step['input_tokens'] for step in steps):,}"
    assert facts["documents"] == f"{sum(step['documents'] for step in steps):,}"
    assert facts["steps"] == "2"
    assert float(facts["loss, last step"]) == pytest.approx(steps[-1]["loss"], abs=1e-4)
    environment = json.loads((run.built.run.path / "environment.json").read_text())
    assert facts["engine"] == environment["in_effect"]["engine"]
    (recipe,) = re.findall(r"```yaml\n(.*?)```", run.text, re.DOTALL)
    said = yaml.safe_load(recipe)
    written = yaml.safe_load((run.built.run.path / "recipe.yaml").read_text())
    assert f"| documents | {environment['data']['train']['documents']:,} |" in run.text.split("## Data")[1]
    assert said["learning_rate"] == written["learning_rate"] and said["tune"] == written["tune"]
    assert "output_dir" not in said
    table = [line.split("|")[1:-1] for line in run.text.split("## Results")[1].splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in row] for row in table if "---" not in row[0]][:3]
    evaluations = [line for line in run.built.lines if "eval_loss" in line]
    column = header.index("loss")
    assert [float(row[column]) for row in rows] == pytest.approx([e["eval_loss"] for e in evaluations], abs=1e-4)


def test_no_local_folder_is_in_a_card_that_goes_to_the_hub(runs, tmp_path):
    path = runs["classifier"].built.run.path
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    text = (path / "recipe.yaml").read_text()
    try:
        (path / "recipe.yaml").write_text(text.replace("builtin:opinions", str(tmp_path / "mine" / "reviews.jsonl")))
        card = write_model_card(path, "someone/tiny").read_text()
    finally:
        (path / "recipe.yaml").write_text(text)
    assert recipe["dataset_name"] == "builtin:opinions"
    assert str(tmp_path) not in card and str(path) not in card
    assert "reviews.jsonl" in card and 'from_pretrained("someone/tiny")' in card and "# tiny\n" in card


@pytest.mark.parametrize(
    ("keys", "step"),
    [
        ({}, 9),
        ({"load_best_model_at_end": True}, 3),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}, 6),
    ],
)
def test_the_figures_belong_to_the_model_that_was_saved(runs, keys, step):
    record = read_record(runs["classifier"].built.run.path)
    record.recipe.clear()
    record.recipe["Recipe"] = keys
    steps = [{"step": n, "loss": 1.0} for n in range(1, 10)]
    figures = ((3, 0.2, 0.7), (6, 0.3, 0.9), (9, 0.4, 0.8))
    evaluations = [{"step": n, "eval_loss": loss, "eval_accuracy": accuracy} for n, loss, accuracy in figures]
    record = replace(record, steps=StepLines(steps), evaluations=StepLines(evaluations))
    start = {"step": 0, "eval_loss": 0.1, "eval_accuracy": 1.0}  # of eval_on_start: of no model that is kept
    found = final_evaluation(replace(record, evaluations=StepLines([start, *evaluations])))
    assert found is not None and found[0] == step
    record = replace(record, steps=StepLines([*steps, {"step": 10, "loss": 1.0}]))
    if not keys:
        assert final_evaluation(record) is None
