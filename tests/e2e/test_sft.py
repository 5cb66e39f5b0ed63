"""The whole way of instruction tuning, from a recipe to a model that others load, on a Llama and on the small OPT."""

import json
from pathlib import Path

import pytest
import torch
from tests.building import build, each_document, loss_of_document, small_opt
from tests.conftest import SHARED_DATA
from tests.launching import TINY, Finished, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from isotune.run.malloc_tuning import malloc_tunables

STEP_KEYS = [
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "supervised_tokens", "input_tokens", "documents"),
    *("step_seconds", "tokens_per_second", "peak_memory_bytes"),
]
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Finished:
    """stories260K, a really trained Llama, tuned by the shipped script."""
    checkpoint = SHARED_DATA / "checkpoints" / "stories260K"
    if not checkpoint.is_dir():
        pytest.skip(f"no checkpoint at {checkpoint}")
    recipe = {
        "model_name_or_path": str(checkpoint),
        "eval_dataset_name": "builtin:greetings",
        "eval_steps": 6,
        "max_seq_length": 512,
        "learning_rate": 3e-3,
        "max_steps": 12,
        "report_to": ["tensorboard"],
        "sample_prompt": "Greet Ada in French.",
    }
    return start(tmp_path_factory.mktemp("llama"), {**TINY, **recipe})


def test_another_architecture_learns_packed_with_the_same_script(llama):
    losses = [line["loss"] for line in llama.steps]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    assert llama.evaluations[-1]["eval_loss"] < llama.evaluations[0]["eval_loss"]
    assert llama.environment["in_effect"]["attention"] == "packed"
    assert llama.environment["isolation"]["leak"] == 0.0
    assert llama.steps[0]["documents"] > 5, "five rows hold several documents each"


def test_the_run_folder_holds_what_is_promised(llama):
    found = {p.name for p in llama.run.iterdir()}
    trackers = {"runs"}
    of_a_run = {"recipe.yaml", "environment.json", "metrics.jsonl", "status.json", "checkpoints"}
    assert found - trackers == {*of_a_run, "model", "loss_curve.png", "samples.json", ".lives"}
    for number, line in enumerate(llama.steps, start=1):
        assert list(line) == STEP_KEYS
        assert line["step"] == number
        assert line["tokens_per_second"] == pytest.approx(line["input_tokens"] / line["step_seconds"])
    assert [line["step"] for line in llama.evaluations] == [6, 12]
    record = llama.environment
    assert {"versions", "git_commit", "world_size", "device", "in_effect", "data_fingerprints"} <= record.keys()
    assert record["world_size"] == 1 and record["threads_per_process"] == 1
    assert record["heap_settings"] == malloc_tunables({}), "the script began anew on a lean heap"
    assert record["versions"]["torch"] == torch.__version__
    assert record["in_effect"]["trained_parameters"] == record["in_effect"]["all_parameters"] > 200_000
    assert set(record["data_fingerprints"]) == {"train", "evaluation"}


def test_its_recipe_runs_again_to_the_same_bits(llama, tmp_path):
    again = start(
        tmp_path,
        {"model_name_or_path": "builtin:opt-tiny", "dataset_name": "builtin:greetings"},
        "--config",
        str(llama.run / "recipe.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
    )

    def figures(lines: list[dict]) -> list[dict]:
        depends_on_the_machine = {"step_seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds"}
        return [{k: v for k, v in line.items() if k not in depends_on_the_machine} for line in lines]

    assert figures(again.lines) == figures(llama.lines)
    weights = [(r.run / "model" / "model.safetensors").read_bytes() for r in (llama, again)]
    assert weights[0] == weights[1]


def test_plain_transformers_loads_the_model_and_finds_the_last_evaluations_loss(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama.run / "model").eval()
    assert model.config._attn_implementation != "packed"
    tokenizer = AutoTokenizer.from_pretrained(llama.run / "model")
    losses, targets = 0.0, 0
    greetings = build(tmp_path, model_name_or_path=str(llama.run / "model"), eval_dataset_name="builtin:greetings")
    with torch.no_grad():
        for ids, supervised in each_document(greetings.trainer.plan.evaluation.documents):
            losses += loss_of_document(model, ids, supervised).item()
            targets += int(supervised.sum())
    assert losses / targets == pytest.approx(llama.evaluations[-1]["eval_loss"], rel=1e-5)
    assert tokenizer.pad_token == "<unk>"


def test_the_sample_answer_is_printed_at_the_end(llama):
    assert "Greet Ada in French." in llama.stdout


def test_tensorboard_has_the_losses_of_the_metrics_file(llama):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = llama.run.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events)).Reload()
    logged = {event.step: event.value for event in reader.Scalars("train/loss")}
    assert logged == {line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in llama.steps}
    evaluated = {event.step: event.value for event in reader.Scalars("eval/loss")}
    assert evaluated == {line["step"]: pytest.approx(line["eval_loss"], rel=1e-6) for line in llama.evaluations}


def test_an_adapter_is_loaded_by_peft_with_the_loss_of_the_last_evaluation(tmp_path):
    from peft import AutoPeftModelForCausalLM

    from isotune.training.from_recipe import save

    model = small_opt(tmp_path / "opt", word_embed_proj_dim=16)
    built = build(
        tmp_path, model_name_or_path=model, tune="lora", learning_rate=1e-2, eval_dataset_name="builtin:greetings"
    )
    lines = built.train()
    save(built.start, built.trainer)
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(built.run.model)).eval()
    losses, targets = 0.0, 0
    with torch.no_grad():
        for ids, supervised in each_document(built.trainer.plan.evaluation.documents):
            losses += loss_of_document(loaded, ids, supervised).item()
            targets += int(supervised.sum())
    assert losses / targets == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)
    with torch.no_grad(), loaded.disable_adapter():
        (ids, supervised) = next(each_document(built.trainer.plan.evaluation.documents))
        without = loss_of_document(loaded, ids, supervised).item()
    with torch.no_grad():
        assert loss_of_document(loaded, ids, supervised).item() < without


def figures_of(folder: Path, **values) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in build(folder, **values).train()]


def test_a_bigger_microbatch_is_the_same_experiment(tmp_path):
    one = figures_of(tmp_path / "1", max_steps=4)
    two = figures_of(tmp_path / "2", max_steps=4, microbatch_tokens=1000)
    for (loss, norm), (other_loss, other_norm) in zip(one, two, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)
    assert one[0][1] == pytest.approx(two[0][1], rel=1e-5)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_checkpointing_changes_no_bit_with_dropout_on(tmp_path, tune):
    model = {"model_name_or_path": small_opt(tmp_path / "opt", **DROPOUT), "tune": tune, "max_steps": 3}
    if tune == "lora":
        model["lora_dropout"] = 0.1
    kept = build(tmp_path / "kept", **model)
    expected = kept.train()
    built = build(tmp_path / "again", **model, gradient_checkpointing=True)
    found = built.train()
    assert [(x["loss"], x["grad_norm"]) for x in found] == [(x["loss"], x["grad_norm"]) for x in expected]
    for name, tensor in kept.model.state_dict().items():
        assert torch.equal(built.model.state_dict()[name], tensor), name
    records = [json.loads((b.run.path / "environment.json").read_text())["in_effect"] for b in (kept, built)]
    assert [record["gradient_checkpointing"] for record in records] == [False, True]


def test_without_packing_every_row_is_one_document(tmp_path):
    built = build(tmp_path, packing=False, max_steps=2, global_batch_size=6)
    steps = built.train()
    assert [line["documents"] for line in steps] == [6, 6]
    assert len(built.trainer.plan.schedule.rows) == len(built.trainer.plan.documents.documents) == 80


def test_train_on_last_supervises_the_last_answer_only(tmp_path):
    every = build(tmp_path / "all", max_steps=1)
    last = build(tmp_path / "last", max_steps=1, train_on="last")
    tokenizer = last.tokenizer
    for (ids, wide), (same, narrow) in zip(
        each_document(every.trainer.plan.documents.documents),
        each_document(last.trainer.plan.documents.documents),
        strict=True,
    ):
        assert torch.equal(ids, same)
        assert narrow.sum() < wide.sum() and bool((wide | ~narrow).all())
        # the corpus asks "And at night?" last; the answer up to its eos is what is learned
        answer = tokenizer.decode(ids).rsplit("### Assistant:", 1)[1]
        assert tokenizer.decode(ids[narrow]).strip() == answer.strip()
    assert last.train()[0]["supervised_tokens"] < every.train()[0]["supervised_tokens"]
