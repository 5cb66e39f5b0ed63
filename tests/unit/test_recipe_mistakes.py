"""A mistake in a recipe is one sentence that names its place, the key and what would be right."""

from pathlib import Path

import pytest
import yaml

from isotune.config import ClassificationRecipe, Recipe, read_recipe
from isotune.io.errors import UserError

REQUIRED = {"model_name_or_path": "a/model", "dataset_name": "a/dataset", "output_dir": "runs/x"}
FLAGS = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as refused:
        read_recipe(argv, default_config=None, prog="sft", description="A test.")
    message = str(refused.value)
    assert "\n" not in message
    return message


def refusal_of_file(folder: Path, text: str, *argv: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    message = refusal("--config", str(path), *argv)
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rat: 1e-4", "line 4: learning_rat is not a key: did you mean learning_rate?"),
        ("zzz: 1", "zzz is not a key: --help-all"),
        ("class_weights: balanced", "class_weights is not a key here: it is of the task classification alone"),
        ("per_device_train_batchsize: 8", "nor is per_device_train_batch_size: the batch of a step is global_batch"),
        ("learning_rate: fast", "learning_rate is 'fast': it takes a number of at least 0"),
        ("learning_rate: .nan", "it takes a number"),
        ("learning_rate: inf", "it takes a number"),
        ("learning_rate:", "learning_rate is empty: it takes a number"),
        ("learning_rate: [1e-4, 1e-5]", "it takes a number"),
        ("max_seq_length: true", "it takes a whole number of at least 2"),
        ("max_seq_length: 10.5", "it takes a whole number"),
        ("max_steps: 0", "it takes a whole number of at least 1, or -1"),
        ("lora_dropout: 1", "of at least 0 and below 1"),
        ("warmup_steps: 2.5", "a whole number, or a share of the run below 1"),
        ("packing: maybe", "it takes true or false"),
        ("tune: half", "it takes full, lora, qlora"),
        ("exact_gradients: perhaps", "true or false or auto"),
        ("target_modules: []", "it takes a list of names"),
        ("model_init: [random]", "it takes pretrained, random"),
        ("seed: -1", "seed is '-1'"),
        ("optim: lomo", "optim is 'lomo'"),
        ("seed: 1\nseed: 2", "line 5: seed is given twice"),
        ("? [a, b]\n: 1", "line 4: a key is one word"),
        ("lr_scheduler_kwargs: &a {x: *a}", "line 4: a value holds itself by an alias"),
        ("report_to: tensorbord", "report_to is 'tensorbord': it takes a list of none, all, tensorboard"),
        ("report_to: [none, wandb]", "line 4: report_to (none, wandb) cannot be: none and all stand alone"),
        ("save_total_limit: 0", "a whole number of at least 1"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "contradict each other: linear takes no arguments"),
        ("lr_scheduler_type: cosine_with_min_lr", "cosine_with_min_lr needs one of min_lr, min_lr_rate and takes"),
        ("eval_dataset_name: d.csv\neval_dataset_split: valid", "eval_dataset_split has no effect"),
        ("r: 8\ntune: full", "line 4: r has no effect: it needs tune: lora"),
        ("bnb_4bit_quant_type: nf4", "has no effect: it needs tune: qlora"),
        ("eval_steps: 5", "eval_steps has no effect"),
        ("eval_dataset_split: test", "eval_dataset_split has no effect"),
        ("eval_strategy: epoch", "eval_strategy has no effect"),
        ("eval_dataset_name: d\neval_strategy: no", "eval_dataset_name has no effect: eval_strategy is no"),
        ("eval_dataset_name: d\neval_strategy: epoch\neval_steps: 5", "eval_steps has no effect"),
        ("lr_scheduler_type: constant\nwarmup_steps: 5", "warmup_steps has no effect"),
        ("optim: sgd\nadam_beta1: 0.8", "adam_beta1 has no effect"),
        ("bf16: true\nfp16: true", "bf16 (true) and"),
        ("max_steps: 5\nnum_train_epochs: 2", "max_steps and num_train_epochs contradict each other"),
        ("microbatch_tokens: 512", "line 4: microbatch_tokens (512) and max_seq_length (1024) contradict each other"),
        ("eval_dataset_name: d\neval_strategy: steps", "say after how many steps, by eval_steps"),
        ("tune: qlora\nmodel_init: random", "only pretrained weights are quantised"),
        ("gradient_checkpointing: true\nactivation_checkpointing: true", "is another name of gradient_checkpointing"),
        ("training_arguments: {learning_rate: 1}", "training_arguments is not a key"),
        ("given: {}", "given is not a key"),
    ],
)
def test_a_wrong_line_of_a_file_is_named_with_what_would_be_right(tmp_path, line, said):
    assert said in refusal_of_file(tmp_path, yaml.safe_dump(REQUIRED) + line + "\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--learning_rat 3", "--learning_rat is not a key: did you mean --learning_rate?"),
        ("--r 0", "--r is '0': it takes a whole number of at least 1"),
        ("--seed", "--seed: expected one argument"),
        ("stray", "'stray' belongs to no flag"),
        ("--bf16 --fp16", "--bf16 (true) and --fp16 (true) contradict each other"),
        ("--tune full --r 3", "--r has no effect"),
        ("--max_steps 5 --num_train_epochs 2", "contradict each other"),
        ("--dataset_name=", "dataset_name is missing"),
        ("--learn 3", "--learn is not a key"),
    ],
)
def test_a_wrong_flag_is_named_with_what_would_be_right(flags, said):
    assert said in refusal(*FLAGS, *flags.split())


@pytest.mark.parametrize("name", ["hub_token", "hub-token", "hub_tokn", "token", "use_auth_token"])
def test_a_token_is_no_flag_and_no_key_and_its_value_is_not_repeated(tmp_path, name):
    ways = ("HF_TOKEN", "HF_TOKEN_PATH", "`hf auth login`")
    said = refusal(*FLAGS, "--push_to_hub", "true", f"--{name}", "hf_private")
    in_file = refusal_of_file(tmp_path, yaml.safe_dump({**REQUIRED, name.replace("-", "_"): "hf_private"}))
    with pytest.raises(UserError) as of_python:
        Recipe.from_values(**REQUIRED, **{name.replace("-", "_"): "hf_private"})
    for sentence in (said, in_file, str(of_python.value)):
        assert all(way in sentence for way in ways) and "hf_private" not in sentence


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("per_device_train_batch_size", "global_batch_size"),
        ("gradient_accumulation_steps", "microbatch_tokens"),
        ("per_device_eval_batch_size", "eval_microbatch_tokens"),
        ("auto_find_batch_size", "microbatch_tokens"),
        ("max_length", "max_seq_length"),
        ("lora_r", "say r"),
        ("lora_target_modules", "target_modules"),
        ("assistant_only_loss", "train_on"),
        ("data_seed", "seed"),
        ("use_cpu", "say device: cpu"),
        ("ddp_backend", "CUDA_VISIBLE_DEVICES"),
        ("deepspeed", "accelerate launch --config_file"),
        ("logging_nan_inf_filter", "on_nonfinite"),
        ("save_only_model", "OUTPUT_DIR/model"),
        ("warmup_ratio", "warmup_steps"),
        ("dataloader_num_workers", "the plan"),
    ],
)
def test_a_key_of_another_tool_is_answered_with_what_to_say_here(tmp_path, key, instead):
    from_file = refusal_of_file(tmp_path, yaml.safe_dump(REQUIRED | {key: 1}))
    for message in (from_file, refusal(*FLAGS, f"--{key}", "1")):
        assert f"{key} is not a key here: " in message
        assert instead in message.split("not a key here: ")[1]


def test_a_split_of_a_single_file_is_refused_but_for_the_one_that_it_is(tmp_path):
    one_file = yaml.safe_dump(REQUIRED | {"dataset_name": "data/train.jsonl"})
    said = refusal_of_file(tmp_path, one_file + "dataset_split: test\n")
    assert "line 4: dataset_split has no effect: dataset_name is one file" in said
    recipe = Recipe.from_values(**REQUIRED | {"dataset_name": "data/train.jsonl", "dataset_split": "train"})
    assert recipe.dataset_split == "train"


def test_a_file_that_contradicts_a_flag_is_named_beside_the_flag(tmp_path):
    message = refusal_of_file(tmp_path, yaml.safe_dump(REQUIRED) + "bf16: true\n", "--fp16")
    assert "recipe.yaml, line 4: bf16 (true) and --fp16 (true)" in message


def test_a_key_without_effect_in_its_own_file_stays_an_error_whatever_the_flags(tmp_path):
    text = yaml.safe_dump(REQUIRED) + "tune: full\nr: 8\n"
    assert "r has no effect" in refusal_of_file(tmp_path, text, "--seed", "1")


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    message = refusal_of_file(tmp_path, "seed: 1\n")
    assert "model_name_or_path, dataset_name, output_dir are missing" in message
    assert "output_dir is missing" in refusal(*FLAGS[:4])
    assert "are missing" in refusal_of_file(tmp_path, "# nothing\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nbf16: [true\n", "line 3 is not YAML"),
        ("seed: 1\n\tbf16: true\n", "line 2 is not YAML"),
        ("seed: 1\n---\nseed: 2\n", "is not YAML"),
        ("a\x00b: 1", "is not YAML"),
        ("- seed\n- bf16\n", "holds no keys"),
        ("just words", "holds no keys"),
    ],
)
def test_a_file_that_is_not_flat_yaml_is_refused_with_its_line(tmp_path, text, said):
    assert said in refusal_of_file(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "latin1.yaml").write_bytes("seed: 1 # é\n".encode("latin-1"))
    assert "there is no such file" in refusal("--config", str(tmp_path / "absent.yaml"))
    assert "is a folder" in refusal("--config", str(tmp_path))
    assert "UTF-8" in refusal("--config", str(tmp_path / "latin1.yaml"))


def test_a_recipe_of_another_task_is_one_sentence_and_not_its_first_unknown_key(tmp_path):
    said = refusal_of_file(tmp_path, yaml.safe_dump(REQUIRED) + "num_labels: 2\ntask: classification\n")
    assert said.endswith("line 5: task is 'classification': this command runs recipes of task: sft")
    assert refusal(*FLAGS, "--task", "sfd").startswith("--task is 'sfd': ")


def test_recipes_made_in_python_are_checked_too():
    with pytest.raises(UserError, match="r has no effect"):
        Recipe.from_values(**REQUIRED, tune="full", r=3)
    with pytest.raises(UserError, match="did you mean learning_rate"):
        Recipe.from_values(**REQUIRED).with_values(learningrate=1)


def test_a_place_that_cannot_be_written_is_the_users_mistake_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Recipe.from_values(**REQUIRED).write(tmp_path / "file" / "recipe.yaml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("key", ["packing", "train_on", "sample_prompt"])
def test_a_key_of_language_models_is_named_as_such_for_a_classifier(key):
    with pytest.raises(UserError, match=f"{key} is not a key here: it is of the task sft alone"):
        ClassificationRecipe.from_values(**REQUIRED, **{key: "last"})
