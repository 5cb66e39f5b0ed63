"""`isotune sft mine.yaml --num_processes 4 --engine zero2`: what a user types is read as it is meant, or refused."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from isotune.cli import main
from isotune.commands import start
from isotune.commands.start import Launch, count_gpus, exit_status, read_launch
from isotune.commands.train import KINDS, recipe_words
from isotune.commands.trained.evaluate import _own_data
from isotune.commands.trained.generate import read_arguments
from isotune.io import extras, shipped
from isotune.io.errors import UserError
from isotune.io.parent_process import pass_on

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The tests themselves may run under one."""
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start, "count_gpus", lambda: 0)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `isotune ARGUMENTS`."""
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    printed = capsys.readouterr()
    return leaving.value.code or 0, printed.out, printed.err


class TestWhat:
    """The word after the command."""

    def test_a_file_a_shipped_name_and_a_run_are_recipes(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("mine.yaml").write_text("task: sft\n")
        Path("runs/one").mkdir(parents=True)
        Path("runs/one/recipe.yaml").write_text("task: sft\n")
        shipped_file = str(REPOSITORY / "train/configs/yelp_bert.yaml")
        own = ["--output_dir", "runs/one", "--resume", "auto"]
        for what, file, more in (("mine.yaml", "mine.yaml", []), ("runs/one", "runs/one/recipe.yaml", own)):
            assert recipe_words("sft", [what, "--seed", "1"], show=False) == ["--config", file, "--seed", "1", *more]
        for what in ("yelp_bert", "yelp_bert.yaml"):
            assert recipe_words("classify", [what], show=False) == ["--config", shipped_file]

    @pytest.mark.parametrize(
        ("flags", "folder", "resume"),
        [
            ([], "moved/one", "auto"),
            (["--output-dir", "new"], "new", "auto"),
            (["--output_dir=new", "--resume", "never"], "new", "never"),
            (["--resume=moved/one/checkpoints/step-00000001"], "moved/one", "moved/one/checkpoints/step-00000001"),
        ],
    )
    @pytest.mark.parametrize("recorded", ["never", "elsewhere/checkpoints/step-00000002"])
    def test_a_run_goes_on_in_its_folder_whatever_its_recipe_records(
        self, tmp_path, monkeypatch, recorded, flags, folder, resume
    ):
        monkeypatch.chdir(tmp_path)
        Path("moved/one").mkdir(parents=True)
        text = "task: sft\nmodel_name_or_path: builtin:opt-tiny\ndataset_name: chats.jsonl\noutput_dir: runs/one\n"
        Path("moved/one/recipe.yaml").write_text(f"{text}resume: {recorded}\n")
        recipe = KINDS["sft"].read(recipe_words("sft", ["moved/one", *flags], show=False), default_config=None, prog="")
        assert (recipe.output_dir, recipe.resume) == (folder, resume)

    def test_a_file_of_the_users_wins_over_a_shipped_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("yelp_bert.yaml").write_text("task: classification\n")
        assert recipe_words("classify", ["yelp_bert.yaml"], show=False) == ["--config", "yelp_bert.yaml"]

    @pytest.mark.parametrize("what", ["reviews.csv", "deep/chats.jsonl.gz", "builtin:opinions", "owner/reviews"])
    def test_a_data_set_brings_defaults_that_are_shown(self, capsys, what):
        words = recipe_words("classify", [what, "--seed", "3"], show=True)
        assert words[:4] == ["--dataset_name", what, "--seed", "3"]
        chosen = dict(zip(words[4::2], words[5::2], strict=True))
        assert chosen["--eval_split_share"] == "0.1" and chosen["--output_dir"].startswith("runs/")
        shown = capsys.readouterr().out
        assert all(f"{flag} {value}" in shown for flag, value in chosen.items())

    def test_what_is_given_is_not_chosen(self):
        flags = ["--model-name-or-path=x", "--output_dir", "here", "--eval_dataset_name", "held.csv"]
        words = recipe_words("classify", ["reviews.csv", *flags], show=False)
        assert words == ["--dataset_name", "reviews.csv", *flags, "--tune", "full"]

    @pytest.mark.parametrize(
        ("given", "not_chosen"),
        [
            ({"tune": "lora", "model_name_or_path": "builtin:bert-tiny"}, {"tune", "model_name_or_path"}),
            ({"output_dir": "here"}, {"output_dir"}),
            ({"eval_split_share": "0.3"}, {"eval_split_share"}),
            ({"eval_dataset_name": "held.csv"}, {"eval_split_share"}),
            ({"eval_dataset_mixture": '[{"dataset_name": "held.csv"}]'}, {"eval_split_share"}),
            ({"r": "4"}, {"tune"}),
            ({"learning_rate": "1e-3"}, set()),
        ],
    )
    @pytest.mark.parametrize("in_file", [False, True])
    def test_what_flags_or_their_file_give_is_not_chosen(self, tmp_path, monkeypatch, given, not_chosen, in_file):
        monkeypatch.chdir(tmp_path)
        Path("mine.yaml").write_text("".join(f"{key}: {value}\n" for key, value in given.items()))
        flags = ["--config", "mine.yaml"] if in_file else [f"--{key}={value}" for key, value in given.items()]
        words = recipe_words("classify", ["reviews.csv", *flags], show=False)
        chosen = {*KINDS["classify"].defaults, "output_dir"} - not_chosen
        assert {word.removeprefix("--") for word in words[2 + len(flags) :: 2]} == chosen
        recipe = KINDS["classify"].read(words, default_config=None, prog="")
        told = {key: str(recipe.values[key]) for key in given if key not in ("eval_dataset_mixture", "learning_rate")}
        assert told == {key: value for key, value in given.items() if key in told}

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["yelp_bert", "--config", "other.yaml"], "--config other.yaml: the recipe is named already, yelp_bert"),
            (
                ["reviews.csv", "--dataset-name=b.csv"],
                "--dataset_name b.csv: the data set is named already, reviews.csv",
            ),
            (["reviews.csv", "--config", "absent.yaml"], "--config absent.yaml: there is no such file"),
        ],
    )
    def test_what_is_named_twice_or_absent_is_refused(self, tmp_path, monkeypatch, words, says):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=re.escape(says)):
            recipe_words("classify", words, show=False)

    def test_an_evaluation_takes_one_run(self, capsys):
        for flag in ("--run_dir=runs/two", "--model=two"):
            status, _, complaint = run(capsys, "eval", "one", flag)
            assert status == 2 and f"{flag}: the run or model is named already, one" in complaint

    def test_a_misspelt_recipe_is_answered_with_the_nearest(self):
        with pytest.raises(UserError, match=r"yelp_brt is no recipe.*did you mean yelp_bert\?"):
            recipe_words("classify", ["yelp_brt"], show=False)
        with pytest.raises(UserError, match="isotune ls"):
            recipe_words("sft", ["nowhere/at/all.yaml"], show=False)
        with pytest.raises(UserError, match="name a recipe, a data file or flags"):
            recipe_words("sft", [], show=False)


class TestLaunch:
    """`--num_processes` and `--engine`."""

    def test_the_flags_are_taken_out_and_the_rest_keeps_its_order(self):
        words = [
            "mine.yaml",
            "--engine",
            "zero2",
            "--target_modules",
            "q",
            "v",
            "--num_processes=4",
            "--max_steps",
            "-1",
        ]
        launch, rest = read_launch(words)
        assert launch == Launch(REPOSITORY / "accelerate_configs/zero2.yaml", 4)
        assert rest == ["mine.yaml", "--target_modules", "q", "v", "--max_steps", "-1"]

    @pytest.mark.parametrize(
        ("words", "gpus", "engine", "processes"),
        [
            ([], 0, None, 1),
            ([], 1, None, 1),
            ([], 4, "ddp", 4),
            (["--num_processes", "1"], 4, None, 1),
            (["--num_processes", "3"], 0, "ddp", 3),
            (["--engine", "single"], 0, None, 1),
            (["--engine", "fsdp2"], 0, "fsdp2", 2),  # as the file says
            (["--engine", "fsdp2"], 8, "fsdp2", 8),
        ],
    )
    def test_the_defaults_are_the_gpus_and_ddp(self, monkeypatch, words, gpus, engine, processes):
        monkeypatch.setattr(start, "count_gpus", lambda: gpus)
        launch, _ = read_launch(words)
        assert (launch.file and launch.file.stem, launch.processes) == (engine, processes)

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--engine", "zero22"], "'zero22' is neither a file nor a name of a shipped one: did you mean 'zero2'"),
            (["--engine", "single", "--num_processes", "2"], "--engine single is one process"),
            (["--num_processes", "0"], "at least one process"),
            (["--num_processes", "two"], "invalid int value"),
        ],
    )
    def test_a_launch_that_cannot_be_is_refused(self, words, says):
        with pytest.raises(UserError, match=says):
            read_launch(words)

    def test_a_process_of_a_launcher_does_the_work_and_takes_no_launch(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert read_launch(["mine.yaml"]) == (Launch(), ["mine.yaml"])
        with pytest.raises(UserError, match="a launcher started this process"):
            read_launch(["mine.yaml", "--engine", "ddp"])

    def test_a_missing_package_of_an_engine_is_one_sentence_with_the_pip_command(self, monkeypatch):
        monkeypatch.setattr(extras, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"--engine zero3 needs deepspeed: pip install 'isotune\[deepspeed\]'"):
            read_launch(["mine.yaml", "--engine", "zero3"])
        assert read_launch(["mine.yaml", "--engine", "ddp", "--num_processes", "2"])[0].processes == 2

    @pytest.mark.parametrize(
        ("code", "written", "status"),
        [
            (0, {"exit_status": 0}, 0),
            (1, {"exit_status": 2}, 2),
            (1, {"exit_status": 75}, 75),
            (0, {"exit_status": 75}, 75),  # the ranks left with 0, so that no launcher ends the others
            (1, {"exit_status": 0}, 1),  # a rank failed after the first had finished
            (1, {}, 1),
            (-9, {"status": "running", "exit_status": None}, 1),
            (0, {}, 0),
        ],
    )
    def test_the_exit_status_is_the_runs(self, code, written, status):
        assert exit_status(code, written) == status

    def test_gpus_are_those_of_the_driver_that_the_user_shows(self, monkeypatch):
        monkeypatch.undo()
        driver = [Path(f"/dev/{name}") for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")]
        monkeypatch.setattr(Path, "glob", lambda self, pattern: driver)
        assert count_gpus({}) == 2
        assert count_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1
        assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == count_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0
        monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
        assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("sweep", "yelp_bert", "--help-all"), "label_source"),
        (("sweep", "demo_base", "--help-all"), "train_on"),
        (("plan", "--config", "yelp_bert", "--help-all"), "label_source"),
        (("plan", "--help-all"), "train_on"),
    ],
)
def test_help_all_lists_the_keys_of_the_recipe_wherever_they_are_flags(tmp_path, monkeypatch, capsys, words, key):
    monkeypatch.chdir(tmp_path)
    status, text, _ = run(capsys, *words)
    assert status == 0 and f"--{key} " in text and list(tmp_path.iterdir()) == []


class TestSlurm:
    """`isotune slurm`."""

    def test_the_batch_file_is_printed_with_its_resources_and_nothing_is_written(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        flags = ("--nodes", "2", "--gpus_per_node", "4", "--engine", "zero2", "--time", "01:00:00", "--seed", "7")
        status, text, _ = run(capsys, "slurm", "classify", "yelp_bert", *flags, "--dry-run")
        assert status == 0 and list(tmp_path.iterdir()) == []
        lines = text.splitlines()
        for option in (
            "nodes=2",
            "gpus-per-node=4",
            "ntasks-per-node=1",
            "time=01:00:00",
            "signal=B:USR1@300",
            "requeue",
        ):
            assert f"#SBATCH --{option}" in lines
        assert f"export ISOTUNE_FILES={REPOSITORY} ENGINE=${{ENGINE:-zero2}}" in lines
        recipe = REPOSITORY / "train/configs/yelp_bert.yaml"
        assert lines[-1] == f"launch -m isotune.cli classify --config {recipe} --seed 7"
        names = [line.split("--")[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
        assert len(names) == len(set(names)), "an option stands twice"

    @pytest.mark.parametrize(
        ("name", "job"), [("my chats.sbatch", "my-chats"), ("a #b;c.sbatch", "a-b-c"), ("größe-1.sbatch", "größe-1")]
    )
    def test_a_name_of_any_letters_is_one_word_for_sbatch_and_for_the_shell(self, capsys, name, job):
        _, text, _ = run(capsys, "slurm", "classify", "yelp_bert", "--batch_file", name, "--dry-run")
        lines = text.splitlines()
        assert f"#SBATCH --job-name=isotune-{job}" in lines
        assert shlex.split(lines[1].partition("again with: ")[2]) == ["sbatch", name]
        assert all(len(shlex.split(line)) == 2 for line in lines if line.startswith("#SBATCH"))

    @pytest.mark.parametrize("engine", ["zero2.yaml", str(REPOSITORY / "accelerate_configs/zero2.yaml")])
    def test_an_engine_is_named_by_its_file_too(self, tmp_path, monkeypatch, capsys, engine):
        monkeypatch.chdir(tmp_path)
        needed = []
        monkeypatch.setattr("isotune.commands.slurm.need", lambda package, flag: needed.append((package, flag)))
        words = ("--nodes", "2", "--engine", engine, "--dry-run")
        status, text, _ = run(capsys, "slurm", "classify", "yelp_bert", *words)
        assert status == 0 and f"export ISOTUNE_FILES={REPOSITORY} ENGINE=${{ENGINE:-zero2}}" in text.splitlines()
        assert needed == [("deepspeed", "--engine zero2")]

    def test_shellcheck_finds_nothing_in_it(self, tmp_path, capsys):
        _, text, _ = run(capsys, "slurm", "sft", "demo_base", "--partition", "cpu", "--gpus_per_node", "0",
                         "--processes_per_node", "2", "--sample_prompt", "What's $HOME?", "--dry-run")  # fmt: skip
        (tmp_path / "job.sbatch").write_text(text)
        shellcheck = Path(sys.executable).with_name("shellcheck")
        done = subprocess.run(
            [shellcheck, "-x", "-S", "warning", tmp_path / "job.sbatch"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
        assert "ENGINE=${ENGINE:-ddp}" in text and """'What'"'"'s $HOME?'""" in text

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["classify", "yelp_bert", "--learning_rat", "1"], "did you mean --learning_rate?"),
            (["sft", "yelp_bert"], "this command runs recipes of task: sft"),
            (["classify", "yelp_bert", "--engine", "single", "--nodes", "2"], "--engine single is one process"),
            (["classify", "yelp_bert", "--engine", "single.yaml", "--nodes", "2"], "--engine single is one process"),
            (["classify", "yelp_bert", "--engine", "mine.yaml"], "--engine 'mine.yaml' is neither a file nor a name"),
            (["classify", "yelp_bert", "--engine", __file__], "is a file of your own: a job takes ddp,"),
            (["classify", "yelp_bert", "--processes_per_node", "2"], "say --gpus_per_node 0"),
            (["plan", "yelp_bert"], "invalid choice: 'plan'"),
            (["eval"], "name a run first"),
            (
                ["sft", "demo_base", "--hub_token", "hf_private", "--dry-run"],
                "--hub_token is not a key here: others",
            ),
            (["eval", "runs/mine", "--hub-token=hf_private", "--dry-run"], "--hub_token is not a flag here: others on"),
            (["sft", "demo_base", "--batch_file", "/bin/ls"], "--batch_file /bin/ls: line 1 holds the byte 0x"),
            (["sft", "demo_base", "--batch_file", "/tmp"], "--batch_file /tmp is a folder, not a file; name another"),
            (["sft", "demo_base", "--batch_file", "/dev/null"], "--batch_file /dev/null is a device, not a file"),
        ],
    )
    def test_a_mistake_is_answered_before_the_queue(self, tmp_path, monkeypatch, capsys, words, says):
        monkeypatch.chdir(tmp_path)
        status, printed, complaint = run(capsys, "slurm", *words)
        assert status == 2 and says in complaint and list(tmp_path.iterdir()) == []
        assert "hf_private" not in printed + complaint and complaint.count("\n") == 1

    def test_a_changed_batch_file_is_left_alone(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("mine.sbatch").write_text("# mine\n")
        status, _, complaint = run(capsys, "slurm", "classify", "yelp_bert", "--batch_file", "mine.sbatch")
        assert status == 2 and "mine.sbatch exists and differs" in complaint
        assert Path("mine.sbatch").read_text() == "# mine\n"


class TestFiles:
    """`isotune ls`, `isotune cp` and what a wheel carries."""

    def test_every_file_of_the_shipped_folders_is_listed_and_can_be_copied(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        status, listed, _ = run(capsys, "ls", "recipes", "tasks", "engines")
        assert status == 0
        for folder in (shipped.RECIPES, shipped.TASKS, shipped.ENGINES):
            for file in (REPOSITORY / folder).iterdir():
                assert f"  {file.stem} " in listed
                assert run(capsys, "cp", file.stem, f"copies/{file.name}")[0] == 0
                assert yaml.safe_load(Path("copies", file.name).read_text()) == yaml.safe_load(file.read_text())

    def test_a_copy_names_the_command_for_it_and_replaces_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert run(capsys, "cp", "yelp_bert", "mine.yaml") == (0, "copied      mine.yaml\n", "")
        assert "#   command  isotune classify mine.yaml\n" in Path("mine.yaml").read_text()
        assert run(capsys, "cp", "xlmr_base")[0] == 0 and Path("xlmr_base.yaml").is_file()
        assert "isotune classify xlmr_base.yaml\n" in Path("xlmr_base.yaml").read_text()
        assert "mine.yaml exists" in run(capsys, "cp", "yelp_bert", "mine.yaml")[2]
        assert "did you mean 'yelp_bert'" in run(capsys, "cp", "yelp_brt")[2]

    def test_runs_are_listed_with_how_they_ended(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        run_folder = Path("runs/one")
        run_folder.mkdir(parents=True)
        (run_folder / "recipe.yaml").write_text("task: classification\n")
        (run_folder / "status.json").write_text('{"status": "preempted", "step": 12}')
        (run_folder / "metrics.jsonl").write_text('{"step": 10, "eval_loss": 0.25, "eval_accuracy": 0.5}\n')
        _, listed, _ = run(capsys, "ls", "runs")
        assert listed.split()[3:] == [
            str(run_folder), "classification", "preempted", "at", "step", "12", "loss", "0.25",
        ]  # fmt: skip
        assert "there is no such list: did you mean 'runs'?" in run(capsys, "ls", "run")[2]

    @pytest.mark.parametrize("flag", ["--dataset_n", "--dataset_na=mine.jsonl", "--tas"])
    def test_a_shortened_flag_is_refused_and_does_not_lose_to_the_runs_own_data(self, tmp_path, capsys, flag):
        (tmp_path / "recipe.yaml").write_text("task: sft\neval_dataset_name: held.jsonl\n")
        status, _, complaint = run(capsys, "eval", str(tmp_path), flag, *([] if "=" in flag else ["mine.jsonl"]))
        assert status == 2 and f"unrecognized arguments: {flag}" in complaint

    def test_an_evaluation_of_a_run_is_on_its_own_data(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text("task: sft\neval_dataset_name: held.jsonl\neval_dataset_split: test\n")
        source = ["--run_dir", str(tmp_path)]
        assert _own_data(source, []) == ["--dataset_name", "held.jsonl", "--dataset_split", "test"]
        for split in (["--dataset_split", "validation"], ["--dataset_split=validation"]):
            flags = [*split, *_own_data(source, split)]
            assert read_arguments([*source, *flags], prog="", description="").dataset_split == "validation"
        assert _own_data(source, ["--task", "guanaco"]) == []
        (tmp_path / "recipe.yaml").write_text("task: sft\n")
        with pytest.raises(UserError, match="trained without evaluation data: say --dataset_name or --task"):
            _own_data(source, [])

    def test_the_extras_are_those_of_the_package(self):
        import tomllib

        declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for package, extra in extras.EXTRAS.items():
            name = {"rouge_score": "rouge-score", "lm_eval": "lm-eval", "flash_attn": "flash-attn"}.get(
                package, package
            )
            assert any(line.startswith(name) for line in declared[extra]), package
        whole = {"deepspeed", "qlora", "eval", "arena", "serve", "sweep", "export"}
        assert declared["all"] == [f"isotune[{','.join(name for name in declared if name in whole)}]"]


@pytest.mark.parametrize("wanted", ["auto", "cuda", "mps", "cpu"])
def test_the_device_is_a_gpu_else_mps_for_one_process_else_the_cpu(monkeypatch, wanted):
    import torch

    from isotune.distributed.device import choose_device

    def chosen(cuda: bool, mps: bool, processes: int = 1) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        try:
            return choose_device(wanted, processes)
        except UserError as error:
            return str(error).split(" needs ")[0].split(" is one ")[0]

    seen = [chosen(True, True), chosen(False, True), chosen(False, True, 2), chosen(False, False)]
    assert (
        seen
        == {
            "auto": ["cuda", "mps", "cpu", "cpu"],
            "cuda": ["cuda", "device: cuda", "device: cuda", "device: cuda"],
            "mps": ["mps", "mps", "device: mps", "device: mps"],
            "cpu": ["cpu"] * 4,
        }[wanted]
    )


def test_a_module_started_by_its_name_is_the_program(tmp_path):
    (tmp_path / "named.py").write_text(
        "import sys\nfrom isotune.run.malloc_tuning import _is_the_program\nprint(_is_the_program())\n"
    )
    around = "import runpy, sys; sys.argv = ['x', 'y']; runpy.run_module('named', run_name='__main__', alter_sys=True)"
    for command, is_program in (
        (["-m", "named", "a", "b"], True),
        (["named.py"], True),
        (["-c", around], False),
    ):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{is_program}\n"


@pytest.mark.parametrize(("platform", "calls"), [("linux", ["SIGINT", "SIGTERM"]), ("win32", ["end"])])
def test_signals_are_passed_on_where_there_are_any(platform: str, calls: list[str], monkeypatch):
    class Process:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def send_signal(self, number: int) -> None:
            if platform == "win32":
                raise ValueError(f"Unsupported signal: {number}")
            self.calls.append(signal.Signals(number).name)

        def terminate(self) -> None:
            self.calls.append("end")

    monkeypatch.setattr(sys, "platform", platform)
    process = Process()
    for number in (signal.SIGINT, signal.SIGTERM):
        pass_on(process, number)
    assert process.calls == calls
