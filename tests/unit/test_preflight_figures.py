"""A plan's figures against independent counts: parameters, bytes, products, what is sent, what fits."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.building import OPT_350M
from tests.launching import REPOSITORY, run_command
from transformers import BloomConfig, OPTConfig, OPTForCausalLM

from isotune.cli import main
from isotune.config import Recipe
from isotune.data.batch_schedule import StepSchedule
from isotune.data.sft.preparation import prepare_conversations
from isotune.io.errors import UserError
from isotune.models.base.builtin import builtin_tokenizer
from isotune.models.packed_attention import set_packed_attention
from isotune.models.supervised_loss import install_supervised_loss
from isotune.preflight import preflight_report
from isotune.preflight.preflight_report import run_preflight
from isotune.preflight.render import as_json, draw_scaling, render_report
from isotune.preflight.request import read_preflight_request, shipped_launch
from isotune.preflight.resources.activation_memory import trace_microbatch
from isotune.preflight.resources.compute import flops_per_step
from isotune.preflight.resources.devices import find_device
from isotune.preflight.resources.memory import parse_bytes
from isotune.preflight.resources.sharding import Sharding

TINY = {
    "model_name_or_path": "builtin:opt-tiny",
    "dataset_name": "builtin:greetings",
    "output_dir": "runs/planned",
    "max_seq_length": 128,
    "global_batch_size": 4,
    "max_steps": 3,
}


def words(**values) -> list[str]:
    return [word for key, value in (TINY | values).items() for word in (f"--{key}", str(value))]


def plan(*, launch: str | None = None, world_size: int | None = None, limit: int | None = None, **values):
    file = launch and str(REPOSITORY / "accelerate_configs" / f"{launch}.yaml")
    more = {name: values.pop(name) for name in ("device", "compare", "world_sizes") if name in values}
    return run_preflight(
        read_preflight_request(None, words(**values), file, world_size), limit=limit, show_progress=False, **more
    )  # fmt: skip


@pytest.fixture
def opt_350m(tmp_path):
    """OPT-350M's configuration in a folder, without weights; returns what transformers itself counts, too."""
    config = OPTConfig(**OPT_350M, vocab_size=50272, max_position_embeddings=2048)
    config.save_pretrained(tmp_path / "opt")
    with torch.device("meta"):
        numbers = sum(p.numel() for p in OPTForCausalLM(config).parameters())
    return str(tmp_path / "opt"), numbers


def test_a_config_is_enough_and_data_that_are_not_there_cost_the_work_alone(opt_350m, tmp_path):
    folder, numbers = opt_350m
    found = plan(model_name_or_path=folder, dataset_name=str(tmp_path / "nowhere.jsonl"), tune="full")
    assert found.model.numel == found.model.trained_numel == numbers
    assert found.memory.weights == 4 * numbers and found.memory.optimizer == 8 * numbers
    assert found.work is None and found.no_work_reason
    assert found.memory.activations > 0
    assert "not counted" in render_report(found, None)


def test_lora_and_four_bit_weights_weigh_what_their_formats_say(opt_350m):
    folder, numbers = opt_350m
    lora = plan(model_name_or_path=folder, tune="lora", r=16, bf16=True)
    # A and B of six targets in each of 24 blocks
    adapters = 24 * 16 * (4 * (1024 + 1024) + 2 * (1024 + 4096))
    assert lora.model.trained_numel == adapters
    assert lora.memory.weights == 2 * numbers + 4 * adapters
    assert lora.memory.gradients == (4 + 8) * adapters, "exact_gradients: auto is on for LoRA"
    qlora = plan(model_name_or_path=folder, tune="qlora", r=16, bf16=True)
    linear = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 512 * 1024  # blocks, project_in and project_out
    four_bits = linear // 2 + linear // 64 + 4 * linear // 64 // 256
    assert qlora.memory.weights == pytest.approx(2 * (numbers - linear) + four_bits + 4 * adapters, rel=1e-6)


def test_the_products_of_a_step_are_those_of_the_formula(opt_350m):
    folder, _ = opt_350m
    found = plan(model_name_or_path=folder, tune="full", tokenizer_name_or_path="builtin:opt-tiny")
    work = found.work
    linear = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 512 * 1024
    by_hand = 6 * linear * work.tokens_per_step + 6 * 50272 * 512 * work.targets_per_step
    by_hand += (
        3 * 2 * work.attention_squares_per_step * 1024 * 24  # causal: half of 4 n^2 d, and twice that backward
    )  # causal: half of 4 n^2 d, and twice that backward
    assert flops_per_step(found.request.recipe, found.model, work) == pytest.approx(by_hand, rel=1e-12)


def test_shares_shrink_with_processes_and_what_is_sent_follows_the_rings():
    two, four = (plan(tune="full", launch="zero3", world_size=n) for n in (2, 4))
    assert two.memory.weights == pytest.approx(2 * four.memory.weights, rel=1e-3)
    assert two.memory.optimized_numel == pytest.approx(2 * four.memory.optimized_numel, rel=1e-3)
    ddp = plan(tune="full", launch="ddp", world_size=4)
    sent = Sharding(ddp.request.recipe, ddp.model, ddp.request.launch).bytes_sent(ddp.work.microbatches_per_rank)
    assert sent == pytest.approx(2 * 3 / 4 * 4 * ddp.model.trained_numel)
    alone = plan(tune="full")
    of_alone = Sharding(alone.request.recipe, alone.model, alone.request.launch)
    assert of_alone.bytes_sent(alone.work.microbatches_per_rank) == 0


def test_what_does_not_fit_is_told_with_changes_that_do():
    many = {"tune": "full", "bf16": True, "dataset_name": "builtin:greetings", "global_batch_size": 16}
    roomy = plan(**many, microbatch_tokens=256, limit=10**12)
    assert roomy.fits and not roomy.suggestions
    limit = plan(**many, microbatch_tokens=128, limit=10**12).memory.total
    assert limit < roomy.memory.total
    tight = plan(**many, microbatch_tokens=256, limit=limit)
    assert tight.fits is False
    assert all(suggestion.total <= limit for suggestion in tight.suggestions)
    assert {"--microbatch_tokens 128": limit}.items() <= {r.change: r.total for r in tight.suggestions}.items()
    assert [r.same_result for r in tight.suggestions] == sorted(
        (r.same_result for r in tight.suggestions), reverse=True
    )
    assert "too large" in render_report(tight, None)


@pytest.mark.parametrize(
    ("is_checkout", "change"), [(True, "--config_file accelerate_configs/zero2.yaml"), (False, "--engine zero2")]
)
def test_a_suggested_engine_is_named_as_this_user_names_it(is_checkout, change, monkeypatch):
    monkeypatch.setattr("isotune.io.shipped.IS_CHECKOUT", is_checkout)
    recipe = Recipe.from_values(**TINY, tune="full")
    found = preflight_report._find_suggestions(recipe, shipped_launch("ddp", 2), 1, lambda *_: SimpleNamespace(total=1))
    assert change in [suggestion.change for suggestion in found]


def test_engines_and_numbers_of_processes_stand_side_by_side():
    found = plan(tune="full", device=find_device("A100-80"), compare=["ddp", "zero2", "zero3"], world_sizes=[1, 4, 16])
    assert [row.launch.world_size for row in found.rows] == [1, 4, 16] * 3
    zero3 = found.rows[6:]
    assert zero3[0].memory.weights > zero3[1].memory.weights > zero3[2].memory.weights
    assert all(row.time is not None and row.time.floor > 0 for row in found.rows)
    assert "ZeRO-3 on 16 processes" in render_report(found, 2.0)
    assert json.loads(json.dumps(as_json(found, 2.0)))["price"] > 0


def test_the_work_is_counted_once_for_each_number_of_processes(monkeypatch):
    counted = []
    stock = preflight_report.count_work
    monkeypatch.setattr(
        preflight_report, "count_work", lambda *given, **more: counted.append(given[-1]) or stock(*given, **more)
    )
    found = plan(tune="full", device=find_device("A100-80"), compare=["ddp", "zero2", "zero3"], world_sizes=[1, 4, 16])
    assert len(found.rows) == 9
    assert sorted(counted) == [1, 4, 16]


def test_a_model_that_pads_is_planned_in_the_microbatches_that_it_runs(tmp_path):
    tokenizer = builtin_tokenizer("builtin:opt-tiny")
    BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    values = {"model_name_or_path": str(tmp_path / "bloom"), "global_batch_size": 16, "microbatch_tokens": 256}
    found = plan(**values)
    recipe = Recipe.from_values(**TINY | values)
    data = prepare_conversations(recipe, tokenizer, show=False).train
    longest, steps = {}, {}
    for padded in (True, False):
        options = {"global_batch_size": 16, "microbatch_tokens": 256, "seed": recipe.seed}
        schedule = StepSchedule(data.documents, data.rows, ranks=1, padded=padded, **options)
        steps[padded] = max(len(schedule.step(number).microbatches) for number in range(3))
        longest[padded] = tuple(data.documents.lengths[list(schedule.costliest(3)[1].documents)].tolist())
    assert longest[True] != longest[False]
    assert found.model.pads and not plan().model.pads
    assert found.work.microbatches_per_step == steps[True] and found.work.costliest_microbatch[0] == longest[True]


def test_where_exact_gradients_make_processes_wait_a_size_of_the_microbatch_is_named_that_does_not():
    values = {"tune": "lora", "global_batch_size": 16, "microbatch_tokens": 2048, "max_steps": 2}
    found = plan(launch="ddp", world_size=4, **values)
    # 16 rows of one or two greetings are one microbatch, which one process runs while three wait
    assert found.work is not None and found.work.imbalance == pytest.approx(3.0)
    assert found.less_waiting is not None and found.less_waiting.imbalance < 0.1
    tokens = found.less_waiting.microbatch_tokens
    assert f"--microbatch_tokens {tokens} makes the imbalance" in render_report(found, None)
    assert as_json(found, None)["less_waiting"]["microbatch_tokens"] == tokens
    better = plan(launch="ddp", world_size=4, **values | {"microbatch_tokens": tokens})
    assert better.work is not None and better.work.imbalance == found.less_waiting.imbalance
    free = plan(launch="ddp", world_size=4, **values, exact_gradients=False)
    assert free.work is not None and free.work.imbalance <= found.less_waiting.imbalance


def test_zero3_gathers_again_what_it_could_not_keep():
    """Forward and backward where nothing may wait; once a pass where the whole model may."""
    plans = {}
    for distance in (0, 10**9):
        asked = plan(tune="full", launch="zero3", world_size=2).request
        section = {"stage": 3, "stage3_param_persistence_threshold": 10_000, "stage3_max_reuse_distance": distance}
        plans[distance] = replace(asked.launch, deepspeed_config={"zero_optimization": section})
    found = plan(tune="full")
    small = sum(4 * p.numel for p in found.model.parameters if p.numel <= 10_000)
    others = 4 * found.model.numel - small
    for distance, times in ((0, 2), (10**9, 1)):
        sent = Sharding(found.request.recipe, found.model, plans[distance]).collectives(3)
        assert sent == {"reduce_scatter": 4 * found.model.numel, "all_gather": small + 3 * times * others}
    held = [Sharding(found.request.recipe, found.model, plans[distance]).gathered_bytes for distance in (0, 10**9)]
    assert held == [min(small + 2 * found.model.largest_block_bytes, small + others), small + others]


def test_a_gpus_loss_is_planned_in_the_steps_that_it_takes():
    """A GPU has the logits of a chunk of positions once; a CPU those of 512, and pieces of a copy and probabilities."""
    small = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}

    def build(layers):
        with torch.device("meta"):
            model = OPTForCausalLM(OPTConfig(vocab_size=50_000, num_hidden_layers=layers, **small))
        set_packed_attention(model)
        install_supervised_loss(model)
        return model

    def held(documents, on_cpu):
        lengths = (600,) * documents
        traced = trace_microbatch(
            build, 1, lengths, sum(lengths), is_classifier=False, autocast=None, on_cpu=on_cpu, checkpointing=False
        )
        return traced.activations

    logits, head, piece = 50_000 * 4, 32 * 50_000 * 4, 2**20 * 4
    assert held(1, on_cpu=False) == pytest.approx(600 * logits + head, rel=0.02)
    chunk = 2**29 // logits // 256 * 256  # positions: 512 MiB, in whole tiles
    assert held(8, on_cpu=False) == pytest.approx(chunk * logits + head, rel=0.05) and chunk < 8 * 600
    assert held(1, on_cpu=True) == pytest.approx(512 * logits + 2 * head + 2 * piece, rel=0.02)


ONLY_TRAINING = ("transformers.trainer", "deepspeed", "trl", "torch._inductor.lowering")
NOT_INSTALLED = f"""
import sys, transformers
for name in [name for name in sys.modules if name.partition(".")[0] in ("isotune", "deepspeed", "trl")]:
    del sys.modules[name]
vars(transformers).pop("Trainer", None)
sys.modules.update(dict.fromkeys({ONLY_TRAINING}))
"""
PLAN = "plan --model_name_or_path builtin:opt-tiny --dataset_name builtin:greetings --max_seq_length 256 --tune lora"


def test_a_plan_needs_no_library_that_only_training_needs():
    plan = f"from isotune.cli import main; main({[*PLAN.split(), '--output_dir', 'x']})"
    for code, status in ((plan, 0), ("from transformers import Trainer", 1)):
        result = run_command([sys.executable, "-c", NOT_INSTALLED + code])
        assert result.returncode == status, result.stderr


@pytest.mark.slow
def test_a_plan_imports_no_library_that_only_training_needs():
    words = [*PLAN.split(), "--output_dir", "x"]
    show = "import atexit, sys; atexit.register(lambda: print(*sys.modules))"
    code = f"{show}; from isotune.cli import main; main({words})"
    result = run_command([sys.executable, "-c", code], fresh=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "isotune.preflight.preflight_report" in loaded
    assert loaded.isdisjoint(ONLY_TRAINING)


@pytest.mark.parametrize(("text", "bytes_"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("512mib", 2**29)])
def test_sizes_have_units(text, bytes_):
    assert parse_bytes(text, "--gpu_memory") == bytes_


@pytest.mark.parametrize("text", ["24", "GiB", "24 cows", "-1GiB", "24G", "infGiB", "nanGiB", "1e308TiB"])
def test_a_size_without_a_unit_is_refused(text):
    with pytest.raises(UserError, match="--gpu_memory"):
        parse_bytes(text, "--gpu_memory")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--per_node", "0"], "--per_node is 0: a node has from 1 to"),
        (["--per_node", "-3"], "--per_node is -3: a node has from 1 to"),
        (["--price_per_hour", "-3"], "--price_per_hour is -3: it is 0 or a positive number"),
        (["--picture", "x.txt"], "--picture x.txt: it is a PNG, so its name ends with .png"),
        (["--picture", "x.pdf"], "--picture x.pdf: it is a PNG, so its name ends with .png"),
        (["--picture", "r.yaml/x.png"], "--picture r.yaml/x.png: what should be its folder is a file"),
        (["--picture", "."], "--picture . is a folder, not a file"),
        (["--picture", ""], "--picture  is a folder, not a file"),
        (["--picture", "/dev/null"], "--picture /dev/null is a device, not a file"),
    ],
)
def test_a_flag_of_the_plan_itself_is_refused_before_the_work(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    monkeypatch.setattr("isotune.preflight.request.read_preflight_request", None)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--world_sizes", "1,2", *flags])
    assert ended.value.code == 2 and says in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("name", ["noext", "x.PNG", "new/folder/x.png"])
def test_the_picture_is_a_png_under_the_name_that_is_printed(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["plan", *words(), "--world_sizes", "1,2", "--json", "--picture", name])
    printed, noted = capsys.readouterr()
    assert [row["world_size"] for row in json.loads(printed)["comparison"]] == [1, 2]
    assert f"picture     {name}\n" in noted
    assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / name]


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"x\.png cannot be written: File name too long"):
        draw_scaling(plan(world_sizes=[1, 2]), tmp_path / ("x" * 300) / "x.png")


def test_names_that_are_none_are_refused():
    with pytest.raises(UserError, match=r"--device H3000 is not known: choose among H200, .*, T4$"):
        find_device("H3000")
    with pytest.raises(UserError, match="--compare zero9"):
        plan(compare=["zero9"])
    with pytest.raises(UserError, match="does not exist"):
        plan(model_name_or_path="./nowhere/at/all")
