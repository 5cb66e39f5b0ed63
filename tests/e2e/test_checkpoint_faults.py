"""What can go wrong with a folder of checkpoints ends in one sentence or in the checkpoint before, never in a loss."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.building import Built, build, small_opt
from tests.launching import TINY, start
from transformers import TrainerCallback

from isotune.checkpoint.export import export_run
from isotune.checkpoint.manifest import verify
from isotune.checkpoint.store import name_of
from isotune.io.errors import AlreadyDone, Preempted, UserError
from isotune.run.preemption import RunStatus, stop_request

TIMED = {"step_seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds"}


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(one.equal(other) for one, other in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return small_opt(tmp_path_factory.mktemp("model"), dropout=0.1)


@pytest.fixture(scope="module")
def recipe(model) -> dict[str, Any]:
    """Six steps over two epochs of three, an evaluation at each epoch's end, a checkpoint of every step."""
    return {
        "model_name_or_path": model,
        "max_seq_length": 128,
        "global_batch_size": 24,
        "microbatch_tokens": 1024,
        "max_steps": 6,
        "save_steps": 1,
        "save_total_limit": 100,
        "eval_dataset_name": "builtin:greetings",
    }


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Built:
    """The run of `recipe`, which no test changes."""
    built = build(tmp_path_factory.mktemp("whole"), **recipe)
    built.train()
    return built


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*"))


def unfinished(folder: Path, source: Path, steps: int) -> Path:
    """A copy of a run as it would lie there, had it been killed after that step's checkpoint."""
    shutil.copytree(source, folder / "run")
    for checkpoint in checkpoints(folder / "run")[steps:]:
        shutil.rmtree(checkpoint)
    return folder / "run"


@pytest.mark.slow  # from one step: test_a_harmed_checkpoint_... and tests/distributed/test_resume.py
def test_a_run_goes_on_from_every_one_of_its_steps_with_the_same_bits(tmp_path, recipe, whole):
    expected = weights(whole.model)
    assert len(checkpoints(whole.run.path)) == 6
    assert [line["step"] for line in lines(whole.run.path)] == [1, 2, 3, 3, 4, 5, 6, 6]  # with the evaluations
    for steps in range(1, 7):
        folder = tmp_path / str(steps)
        run = unfinished(folder, whole.run.path, steps)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')  # what a kill in the middle of a line leaves
        again = build(folder, **recipe)
        again.train()
        assert again.trainer.checkpointer.resumption is not None and again.trainer.checkpointer.resumption.step == steps
        assert lines(run) == lines(whole.run.path), steps
        assert same(weights(again.model), expected), steps


LONGER = [pytest.param(own, marks=pytest.mark.slow) for own in ({"fp16": True}, {"optim": "adafactor"})]


@pytest.mark.parametrize("values", [{"bf16": True, "tune": "lora"}, *LONGER], ids=str)
def test_loss_scale_adapters_and_other_optimizers_go_on_with_the_same_bits(tmp_path, recipe, values):
    values = recipe | values | {"max_steps": 4}
    whole = build(tmp_path / "whole", **values)
    whole.train()
    run = unfinished(tmp_path / "again", whole.run.path, 2)
    again = build(tmp_path / "again", **values)
    again.train()
    assert again.trainer.checkpointer.resumption is not None and again.trainer.checkpointer.resumption.step == 2
    assert lines(run) == lines(whole.run.path)
    assert same(weights(again.model), weights(whole.model))
    scalers = [built.trainer.accelerator.scaler for built in (whole, again)]
    assert (scalers[0] is not None) == ("fp16" in values)
    assert scalers[0] is None or scalers[0].state_dict() == scalers[1].state_dict()


def test_a_harmed_checkpoint_is_passed_over_and_the_run_ends_with_the_same_bits(tmp_path, recipe, whole, capsys):
    run = unfinished(tmp_path / "again", whole.run.path, 5)
    third, fourth, fifth = checkpoints(run)[2:]
    (fifth / "MANIFEST.json").unlink()
    file = next((fourth / "tensors").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    again = build(tmp_path / "again", **recipe)
    again.train()
    said = capsys.readouterr().out
    assert f"skipped {fifth}: it has no MANIFEST.json" in said
    assert f"skipped {fourth}: {file.relative_to(fourth)} is not what was written" in said
    assert f"resumed     after step 3, from {third}" in said
    assert lines(run) == lines(whole.run.path)
    assert same(weights(again.model), weights(whole.model))
    for folder in checkpoints(run):
        verify(folder)


def test_another_recipe_is_refused_with_the_keys_that_differ_and_a_named_checkpoint_must_be_whole(
    tmp_path, recipe, whole
):
    run = unfinished(tmp_path, whole.run.path, 6)
    third = checkpoints(run)[2]
    with pytest.raises(UserError, match=r"another recipe \(learning_rate: 0.001 there, 0.5 here, seed: 42 there, 1"):
        build(tmp_path / "b", **recipe | {"resume": str(third), "seed": 1, "learning_rate": 0.5})
    with pytest.raises(UserError, match=r"no folder .*step-9"):
        build(tmp_path / "b", **recipe | {"resume": str(tmp_path / "step-9")})
    with pytest.raises(UserError, match="is a run: name one of the folders in"):
        build(tmp_path / "b", **recipe | {"resume": str(run)})
    (third / "state.json").unlink()
    broken = build(tmp_path / "b", **recipe | {"resume": str(third)})
    with pytest.raises(UserError, match=r"is not a valid checkpoint: state\.json is missing"):
        broken.train()
    assert not list((tmp_path / "b" / "run").iterdir())


def test_a_checkpoint_of_another_run_is_gone_on_from_with_its_metrics(tmp_path, recipe, whole):
    other = build(tmp_path / "b", **recipe | {"resume": str(checkpoints(whole.run.path)[3])})
    other.train()
    assert lines(other.run.path) == lines(whole.run.path)
    assert same(weights(other.model), weights(whole.model))
    assert [folder.name for folder in checkpoints(other.run.path)] == ["step-00000005", "step-00000006"]


def test_other_data_under_the_same_name_is_refused(tmp_path, recipe):
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"### Human: What is {n}?\n### Assistant: {n} is a number."} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = recipe | {"dataset_name": str(data)}
    first = build(tmp_path, **values)
    first.train()
    rows[0]["text"] = rows[0]["text"].replace("What", "Which")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"\(dataset_name: the contents of .*data\.jsonl have changed since"):
        build(tmp_path, **values)


def test_never_begins_anew_and_a_finished_run_has_nothing_left_to_do(tmp_path, recipe, whole):
    unfinished(tmp_path, whole.run.path, 6)
    anew = build(tmp_path, **recipe | {"resume": "never"})
    anew.train()
    assert anew.trainer.checkpointer.resumption is None
    assert lines(anew.run.path) == lines(whole.run.path)
    anew.run.model.mkdir()
    RunStatus(anew.run.path, is_main=True).write("finished", 0)
    with pytest.raises(AlreadyDone, match="nothing is left to do"):
        build(tmp_path, **recipe)


def test_the_best_evaluation_is_kept_and_can_be_the_final_model(tmp_path, recipe):
    values = recipe | {"save_total_limit": 1, "save_steps": 2, "eval_steps": 1, "learning_rate": 3.0}
    values |= {"lr_scheduler_type": "constant", "load_best_model_at_end": True}
    built = build(tmp_path, **values)
    built.train()
    losses = {line["step"]: line["eval_loss"] for line in built.lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 6, "the test needs a run that gets worse"
    names = [folder.name for folder in checkpoints(built.run.path)]
    assert names == [f"step-{best:08d}", "step-00000006"]
    assert built.trainer.evaluate()["eval_loss"] == losses[best]


@pytest.fixture(scope="module")
def worsening(recipe) -> dict[str, Any]:
    """A run whose evaluations get worse, and whose final model is that of the best."""
    values = recipe | {"eval_steps": 1, "learning_rate": 3.0, "lr_scheduler_type": "constant"}
    return values | {"load_best_model_at_end": True}


@pytest.fixture(scope="module")
def worsened(worsening, tmp_path_factory) -> tuple[Built, int, float]:
    """The run of `worsening`, which no test changes, with the step and the loss of its best evaluation."""
    built = build(tmp_path_factory.mktemp("worsened"), **worsening)
    built.train()
    losses = {line["step"]: line["eval_loss"] for line in built.lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 5, "the tests need a run that gets worse"
    return built, best, losses[best]


def test_the_best_before_a_resume_is_the_final_model_of_another_run_and_of_a_moved_one(
    tmp_path, worsening, worsened, capsys
):
    built, best, loss = worsened
    original = tmp_path / "original"
    unfinished(original, built.run.path, 5)
    other = build(tmp_path / "other", **worsening | {"resume": str(checkpoints(original / "run")[4])})
    other.train()
    assert f"best        step {best}: {loss:.6g}, from {original}" in capsys.readouterr().out
    assert other.trainer.evaluate()["eval_loss"] == loss
    moved = original.rename(tmp_path / "moved")
    (state,) = moved.glob(f"run/checkpoints/{name_of(5)}/trainer_state.json")
    assert str(moved) not in state.read_text(), "the state must name the place before the move"
    again = build(moved, **worsening)
    again.train()
    assert f"best        step {best}: {loss:.6g}, from {moved}" in capsys.readouterr().out
    assert again.trainer.evaluate()["eval_loss"] == loss


def test_a_run_whose_best_checkpoint_is_gone_is_refused_before_it_trains(tmp_path, worsening, worsened):
    built, best, _ = worsened
    run = unfinished(tmp_path, built.run.path, 5)
    shutil.rmtree(run / "checkpoints" / name_of(best))
    before = (run / "metrics.jsonl").read_bytes()
    again = build(tmp_path, **worsening)
    with pytest.raises(UserError, match=rf"is of step {best}, and there is no {name_of(best)} in .*run/checkpoints: "):
        again.train()
    assert (run / "metrics.jsonl").read_bytes() == before


def harmed(folder: Path, how: str) -> str:
    """Harm the weights of a checkpoint; returns what is to be said of it."""
    file = next((folder / "tensors").iterdir())
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        why = "is missing"
    elif how == "cut off":
        file.write_bytes(content[:-100])
        why = f"has {len(content) - 100} bytes and not {len(content)}"
    else:
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
        why = "is not what was written: its hash differs"
    return f"load_best_model_at_end: {folder} is not a valid checkpoint: {file.relative_to(folder)} {why}"


@pytest.mark.parametrize("how", ["missing", "cut off", "changed"])
def test_a_best_checkpoint_that_was_harmed_is_neither_the_final_model_nor_gone_on_beside(
    tmp_path, worsening, worsened, how
):
    built, best, _ = worsened
    run = unfinished(tmp_path, built.run.path, 5)
    folder = run / "checkpoints" / name_of(best)
    said = []

    class Harm(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            said.append(harmed(folder, how))

    again = build(tmp_path, **worsening)
    again.trainer.add_callback(Harm())
    with pytest.raises(UserError) as refused:
        again.train()  # one step, and the harm after it
    assert [str(refused.value)] == said
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(checkpoints(run)[5])
    with pytest.raises(UserError) as refused:
        build(tmp_path, **worsening).train()
    assert [str(refused.value)] == said and (run / "metrics.jsonl").read_bytes() == before


def stop_after(step: int, built: Built, monkeypatch) -> str:
    """Train until a signal stops the run after this step; returns what it ends with."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                monkeypatch.setattr(stop_request, "by", "SIGTERM")

    built.trainer.add_callback(Stop())
    with pytest.raises(Preempted, match=f"stopped after step {step}: ") as ended:
        built.train()
    monkeypatch.setattr(stop_request, "by", None)
    return str(ended.value)


def test_a_requeued_job_goes_on_whatever_its_command_says_and_another_job_does_what_it_says(
    tmp_path, recipe, whole, monkeypatch, capsys
):
    def attempt(job: str, number: int, resume: str) -> Built:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        return build(tmp_path, **recipe | {"resume": resume})

    begins = str(checkpoints(whole.run.path)[0])
    said = stop_after(3, attempt("7", 0, begins), monkeypatch)
    assert said.endswith(f": --resume auto goes on from {checkpoints(tmp_path / 'run')[-1]}")
    requeued = attempt("7", 1, begins)
    assert f"resume: {begins} was for this job's first attempt" in capsys.readouterr().out
    requeued.train()
    assert f"resumed     after step 3, from {tmp_path}" in capsys.readouterr().out
    assert lines(requeued.run.path) == lines(whole.run.path)
    for job, number, resume, after, end in (
        ("8", 1, "never", None, 3),
        ("8", 1, "never", None, 4),  # the same attempt's second command
        ("8", 2, begins, 4, 5),
    ):
        built = attempt(job, number, resume)
        stop_after(end, built, monkeypatch)
        found = built.trainer.checkpointer.resumption
        assert (found.step if found else None) == after


def test_an_evaluation_that_is_made_up_for_after_the_last_step_can_be_the_best(tmp_path, recipe, monkeypatch, capsys):
    values = recipe | {"eval_steps": 3, "load_best_model_at_end": True}
    assert "the same command goes on from" in stop_after(6, build(tmp_path, **values), monkeypatch)
    second = build(tmp_path, **values)
    losses = {line["step"]: line["eval_loss"] for line in second.train() if "eval_loss" in line}
    assert sorted(losses) == [3, 6] and losses[6] < losses[3], "the test needs a run that gets better"
    assert f"best        step 6: {losses[6]:.6g}, from {checkpoints(second.run.path)[-1]}" in capsys.readouterr().out
    assert second.trainer.evaluate()["eval_loss"] == losses[6]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of one's own can be mounted by root only")
def test_a_full_disk_ends_the_run_with_one_sentence_and_the_checkpoint_before_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        # 3.2 MB of weights, 9.5 MB a checkpoint: one fits, and not a second
        full = start(disk, TINY | {"save_steps": 2, "disable_tqdm": True}, expect=2)
        (sentence,) = [line for line in full.stderr.splitlines() if line.startswith("error")]
        assert "the checkpoint of step 4 was not written to" in sentence
        assert "no room on the disk; free some space and run again" in sentence
        assert "Traceback" not in full.stderr
        assert [folder.name for folder in (full.run / "checkpoints").iterdir()] == ["step-00000002"]
        verify(full.run / "checkpoints" / "step-00000002")
        status = json.loads((full.run / "status.json").read_text())
        assert (status["status"], status["exit_status"]) == ("failed", 2)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        resumed = start(disk, TINY | {"save_steps": 2})
        assert "resumed     after step 2" in resumed.stdout
        assert [line["step"] for line in resumed.steps] == [1, 2, 3, 4, 5, 6]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a folder of one's own can be mounted read-only by root only")
def test_a_folder_that_becomes_read_only_ends_the_run_with_one_sentence(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (tmp_path / "run" / ".placeholder").touch()
        built = build(tmp_path / "new", max_steps=2, save_steps=1)
        built.trainer.checkpointer.store.path = folder
        with pytest.raises(UserError, match=r"checkpoint of step 1 was not written to .*: Read-only file system"):
            built.train()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("tune", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_checkpoint_is_exported_as_the_model_that_was_trained_to_that_step(tmp_path, recipe, tune):
    from transformers import AutoModelForCausalLM

    values = recipe | {"tune": tune}
    built = build(tmp_path, **values)
    built.train()
    last = checkpoints(built.run.path)[-1]
    done = export_run(last, merge=tune == "lora")
    assert done.folder.name.startswith("step-00000006-")
    exported: Any = AutoModelForCausalLM.from_pretrained(done.folder)
    model: Any = built.model
    trained = model.merge_and_unload(safe_merge=True) if tune == "lora" else model
    for (name, one), (_, other) in zip(exported.state_dict().items(), trained.state_dict().items(), strict=True):
        assert torch.equal(one, other) if tune == "full" else torch.allclose(one, other, atol=1e-6), name
    assert exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    state = export_run(last, merge=tune == "lora", format="pt").folder / "model.pt"
    read = torch.load(state, weights_only=True)
    assert all(read[name].equal(tensor) for name, tensor in exported.state_dict().items())
    assert not list(built.run.path.glob("export/.*"))


def test_a_broken_checkpoint_is_not_exported(tmp_path, whole):
    run = unfinished(tmp_path, whole.run.path, 6)
    last = checkpoints(run)[-1]
    next((last / "tensors").iterdir()).unlink()
    with pytest.raises(UserError, match=r"is not a valid checkpoint: tensors/.* is missing"):
        export_run(last, merge=False)
    with pytest.raises(UserError, match=r"has no model.*step-00000006 is its last checkpoint"):
        export_run(run, merge=False)
