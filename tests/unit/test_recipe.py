"""What a recipe says: files, flags, defaults, the resolved form, and the recipes that are shipped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from isotune.config import ClassificationRecipe, Recipe, RunRecipe, kind_of, read_recipe
from isotune.projects.arena.recipes import ArenaRecipe, BaselinesRecipe, read_arena_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "train" / "configs").glob("*.yaml"))
REQUIRED = {"model_name_or_path": "a/model", "dataset_name": "a/dataset", "output_dir": "runs/x"}


def read(*argv: str, default: Path | None = None) -> Recipe:
    return read_recipe(argv, default_config=default, prog="sft", description="A test.")


KINDS = {"sft_opt": Recipe} | dict.fromkeys(("yelp", "imdb", "prompts"), ClassificationRecipe)


def read_shipped(path: Path, head_of: Path) -> RunRecipe | BaselinesRecipe:
    """A recipe as the script reads it that the head of `head_of` names in its command."""
    named = re.search(r"train/(\w+)\.py", head_of.read_text())
    assert named
    argv = ["--config", str(path)]
    if named[1] == "arena":
        return read_arena_recipe(argv, default_config=path, prog="p")
    return read_recipe(argv, default_config=None, prog="p", description="A test.", kind=KINDS[named[1]])


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    path = tmp_path / "lora.yaml"
    path.write_text(yaml.safe_dump(REQUIRED | {"r": 8, "learning_rate": "1e-4", "max_steps": 5, "bf16": True}))
    return path


def test_a_flag_wins_over_the_file_and_the_default_file_is_read_without_config(lora_file):
    recipe = read("--r", "4", default=lora_file)
    assert (recipe.r, recipe.bf16, recipe.max_steps) == (4, True, 5)
    assert recipe == read("--config", str(lora_file), "--r=4")


def test_a_config_flag_replaces_the_default_file_instead_of_adding_to_it(lora_file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(REQUIRED))
    assert read("--config", str(other), default=lora_file).r == 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("2", 2.0), (".5", 0.5), ("'3e-5'", 3e-5), ("1.0e-05", 1e-5)],
)
def test_numbers_in_files_are_numbers_however_they_are_written(tmp_path, text, expected):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(REQUIRED) + f"learning_rate: {text}\n")
    assert read("--config", str(path)).training_arguments["learning_rate"] == expected


def test_the_word_no_stays_a_word_where_it_is_a_choice_and_is_false_where_it_is_not(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(REQUIRED) + "eval_strategy: no\npacking: no\n")
    recipe = read("--config", str(path))
    assert recipe.training_arguments["eval_strategy"] == "no"
    assert recipe.packing is False


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["--bf16"], True), (["--bf16", "true"], True), (["--bf16=false"], False), (["--bf16", "False"], False)],
)
def test_a_boolean_flag_may_stand_alone(lora_file, argv, expected):
    assert read(*argv, default=lora_file).bf16 is expected


@pytest.mark.parametrize("argv", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj, v_proj"]])
def test_a_list_flag_takes_words_or_one_word_with_commas(lora_file, argv):
    assert read("--target_modules", *argv, default=lora_file).target_modules == ["q_proj", "v_proj"]


def test_flags_may_be_written_with_hyphens(lora_file):
    assert read("--max-steps", "7", "--learning-rate=3e-4", default=lora_file).max_steps == 7


def test_mappings_are_read_from_files_and_from_json(lora_file, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(REQUIRED) + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\n"
    )
    from_file = read("--config", str(path))
    from_flag = read(
        "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}', default=lora_file
    )
    assert from_file.training_arguments["lr_scheduler_kwargs"] == {"min_lr": 1e-5}
    assert from_flag.training_arguments["lr_scheduler_kwargs"] == {"min_lr": 1e-5}


def test_the_librarys_newer_name_of_gradient_checkpointing_means_the_same(lora_file):
    new, old = (read(f"--{name}", default=lora_file) for name in ("activation_checkpointing", "gradient_checkpointing"))
    assert new == old
    assert old.training_arguments["gradient_checkpointing"] is True


def test_full_tuning_over_a_lora_recipe_drops_its_adapter_keys(lora_file):
    recipe = read("--tune", "full", default=lora_file)
    assert recipe.tune == "full"
    assert "r" not in recipe.resolved()
    assert recipe == read("--tune", "full", "--max_steps", "5", "--learning_rate", "1e-4", "--bf16", *_flags(REQUIRED))


def test_epochs_as_a_flag_put_the_steps_of_a_file_out_of_force(lora_file):
    recipe = read("--num_train_epochs", "2", default=lora_file)
    assert (recipe.max_steps, recipe.num_train_epochs) == (-1, 2.0)
    assert "max_steps" not in recipe.resolved()
    assert "num_train_epochs" not in read(default=lora_file).resolved()


@pytest.mark.parametrize("flags", [["--eval_strategy", "no"], ["--eval_dataset_name", "none"]])
def test_evaluation_is_switched_off_by_one_flag(lora_file, flags):
    lora_file.write_text(lora_file.read_text() + "eval_dataset_name: d\neval_steps: 5\neval_microbatch_tokens: 4096\n")
    assert read(default=lora_file).training_arguments["eval_strategy"] == "steps"
    recipe = read(*flags, default=lora_file)
    assert recipe.eval_dataset_name is None
    assert {name for name in recipe.resolved() if name.startswith("eval")} == {"eval_strategy"}


def test_evaluation_data_alone_are_evaluated_every_epoch():
    recipe = Recipe.from_values(**REQUIRED, eval_dataset_name="d")
    assert recipe.training_arguments["eval_strategy"] == "epoch"
    assert recipe.with_values(eval_steps=10).training_arguments["eval_strategy"] == "steps"


def test_the_memory_knob_follows_the_length_of_a_row_until_it_is_given():
    recipe = Recipe.from_values(**REQUIRED, max_seq_length=512, eval_dataset_name="d")
    assert (recipe.microbatch_tokens, recipe.eval_microbatch_tokens) == ("auto", "auto")
    assert recipe.forward_tokens("microbatch_tokens") == recipe.forward_tokens("eval_microbatch_tokens") == 512
    wider = recipe.with_values(max_seq_length=2048, eval_microbatch_tokens=8192)
    assert wider.forward_tokens("microbatch_tokens") == 2048
    assert wider.forward_tokens("eval_microbatch_tokens") == 8192
    given = recipe.with_values(microbatch_tokens=4096)
    assert (given.microbatch_tokens, given.eval_microbatch_tokens) == (4096, 4096)
    for auto in ("auto", None, "none"):  # as not given
        asked = Recipe.from_values(**REQUIRED, max_seq_length=512, eval_dataset_name="d", eval_microbatch_tokens=auto)
        assert asked.with_values(microbatch_tokens=4096).forward_tokens("eval_microbatch_tokens") == 4096
        assert "eval_microbatch_tokens" not in asked.given
        assert given.with_values(eval_microbatch_tokens=auto).forward_tokens("eval_microbatch_tokens") == 4096


def test_the_learning_rate_follows_what_is_trained_until_it_is_given():
    recipe = Recipe.from_values(**REQUIRED)
    assert recipe.training_arguments["learning_rate"] == 2e-4
    assert recipe.with_values(tune="full").training_arguments["learning_rate"] == 2e-5
    assert recipe.with_values(tune="full", learning_rate=1e-3).training_arguments["learning_rate"] == 1e-3


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe.from_values(**REQUIRED | {"output_dir": "~/runs"})
    assert recipe.output_dir == str(tmp_path / "runs")


VALUES = {
    "model_init": st.sampled_from(["pretrained", "random"]),
    "tokenizer_name_or_path": st.sampled_from(["t", "null"]),
    "tune": st.sampled_from(["full", "lora"]),
    "dataset_split": st.text(min_size=1).filter(lambda text: text.isprintable()),
    "train_on": st.sampled_from(["all", "last"]),
    "max_seq_length": st.integers(2, 2048),
    "microbatch_tokens": st.integers(2048, 10**6),
    "global_batch_size": st.integers(1, 4096),
    "learning_rate": st.floats(0, 1),
    "adam_epsilon": st.floats(1e-300, 1),
    "warmup_steps": st.one_of(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True)),
    "seed": st.integers(0, 2**32 - 1),
    "exact_gradients": st.sampled_from(["auto", True, False]),
    "sample_prompt": st.text(st.characters(categories=["L", "N", "P", "Zs"])),
    "run_name": st.sampled_from(["no", "1e-4", "007", "2024-01-01", "null-hypothesis", "a: b # c"]),
    "report_to": st.lists(st.sampled_from(["tensorboard", "wandb"]), min_size=1, unique=True),
    "bf16": st.booleans(),
    "gradient_checkpointing": st.booleans(),
}


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES), st.sampled_from([{}, {"eval_dataset_name": "d", "eval_steps": 3}]))
def test_a_written_recipe_reads_back_as_the_same_recipe(tmp_path_factory, values, evaluation):
    recipe = Recipe.from_values(**REQUIRED, **values, **evaluation)
    path = tmp_path_factory.mktemp("run") / "recipe.yaml"
    recipe.write(path)
    again = read("--config", str(path))
    assert again == recipe
    assert again.resolved() == recipe.resolved()
    assert again.fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_survives_being_written(path, tmp_path):
    recipe = read_shipped(path, path)
    recipe.write(tmp_path / "recipe.yaml")
    assert read_shipped(tmp_path / "recipe.yaml", path) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_names_its_task_and_keeps_it_in_its_resolved_form(path):
    named = yaml.safe_load(path.read_text())["task"]
    assert read_shipped(path, path).resolved()["task"] == named


def test_the_task_is_that_of_the_script_and_does_not_change_the_result():
    assert Recipe.from_values(**REQUIRED).resolved()["task"] == "sft"
    recipe = ClassificationRecipe.from_values(**REQUIRED)
    assert recipe.resolved()["task"] == "classification"
    assert "task" not in recipe.result_values()
    assert recipe == ClassificationRecipe.from_values(**REQUIRED, task="classification")


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"task": "sft"}, Recipe),
        ({"task": "classification"}, ClassificationRecipe),
        ({"packing": False}, Recipe),
        ({"num_labels": 2}, ClassificationRecipe),
        ({}, ClassificationRecipe),
        ({"method": "encoder"}, ArenaRecipe),
        ({"method": "encoder", "task": "classification"}, ArenaRecipe),
    ],
)
def test_the_kind_of_a_resolved_recipe_is_known_by_its_task_or_else_by_its_keys(more, kind):
    assert kind_of(REQUIRED | more) is kind


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_opens_with_its_command_its_cost_and_its_result(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert all(word in head for word in ("command", "cost", "result"))
    script = re.search(r"train/\w+\.py", head)
    assert script
    is_default = f'"configs" / "{path.name}"' in (REPOSITORY / script[0]).read_text()
    assert is_default or f"--config train/configs/{path.name}" in head


def test_a_written_recipe_is_grouped_and_holds_only_what_is_in_effect(tmp_path):
    path = tmp_path / "new" / "recipe.yaml"
    Recipe.from_values(**REQUIRED, tune="full").write(path)
    text = path.read_text()
    headings = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    assert headings == [
        "Model", "Data", "Batch and schedule", "Optimiser", "Precision and memory", "Output and logging",
    ]  # fmt: skip
    assert not {"r", "bnb_4bit_quant_type", "max_steps", "eval_steps"} & set(yaml.safe_load(text))
    assert [entry.name for entry in path.parent.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"output_dir": "elsewhere"}, True),
        ({"report_to": ["tensorboard"]}, True),
        ({"logging_steps": 50}, True),
        ({"microbatch_tokens": 8192}, True),
        ({"resume": "never"}, True),
        ({"sample_prompt": ""}, True),
        ({"gradient_checkpointing": True}, True),
        ({"learning_rate": 1e-5}, False),
        ({"seed": 1}, False),
        ({"r": 8}, False),
        ({"tune": "full"}, False),
        ({"max_steps": 3}, False),
        ({"dataset_name": "other"}, False),
        ({"bf16": True}, False),
    ],
)
def test_the_fingerprint_changes_with_the_experiment_and_with_nothing_else(change, same):
    recipe = Recipe.from_values(**REQUIRED)
    assert (recipe.with_values(**change).fingerprint() == recipe.fingerprint()) is same


def test_help_is_short_and_help_all_is_complete(capsys):
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            read(flag)
        assert ended.value.code == 0
        texts[flag] = capsys.readouterr().out
    for text in texts.values():
        assert all(f"\n{group}:\n" in text for group in ("Model", "Data", "Adapter", "Output and logging"))
        assert "--learning_rate" in text
    assert "--trackio_space_id" not in texts["--help"]
    assert all(f"--{name} " in texts["--help-all"] for name in set(Recipe.keys()))
    assert "warmup_ratio" in texts["--help-all"]


def test_help_may_be_cut_short_by_its_reader():
    program = (
        "from isotune.config import read_recipe; "
        "read_recipe(['--help-all'], default_config=None, prog='sft', description='A test.')"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    _, complaint = child.communicate()
    assert (child.returncode, complaint) == (0, b"")


def test_reading_a_recipe_imports_no_heavy_library():
    program = (
        "import sys; from isotune.config import Recipe; "
        "Recipe.from_values(model_name_or_path='m', dataset_name='d', output_dir='o'); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _flags(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]
