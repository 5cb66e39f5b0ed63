"""What a user types to launch, right and wrong: other launchers, busy ports, launches that became another one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.launching import REPOSITORY, TINY, Finished, launcher, run_command, start, write_recipe

LORA = {**TINY, "tune": "lora", "lora_dropout": 0.1, "learning_rate": 1e-2, "save_strategy": "no"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def refused(command: list[str], run: Path) -> str:
    """The one sentence of a launch that is refused before anything is written."""
    done = run_command(command)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert not run.exists()
    return errors[0]


def test_two_processes_on_the_cpu_that_would_be_one_are_refused(tmp_path: Path):
    recipe = write_recipe(tmp_path, TINY)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    said = refused([*accelerate, "train/sft_opt.py", "--config", str(recipe)], tmp_path / "run")
    assert "2 processes were asked (num_processes) and 1 started" in said


def test_deepspeed_that_would_be_a_plain_process_is_refused(tmp_path: Path):
    recipe = write_recipe(tmp_path, TINY)
    command = [*launcher("zero2.yaml", 2), "--cpu", "train/sft_opt.py", "--config", str(recipe)]
    said = refused(command, tmp_path / "run")
    assert "accelerate_configs/zero2.yaml asks for DeepSpeed, and accelerate started a plain process" in said


def test_a_misspelled_key_in_a_launched_file_is_refused(tmp_path: Path):
    written = yaml.safe_load((REPOSITORY / "accelerate_configs/zero2.yaml").read_text())
    written["deepspeed_config"]["zero3_init_flagg"] = True
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(written))
    recipe = write_recipe(tmp_path, TINY)
    command = [*launcher(str(tmp_path / "mine.yaml"), 2), "train/sft_opt.py", "--config", str(recipe)]
    said = refused(command, tmp_path / "run")
    assert "deepspeed_config has no key 'zero3_init_flagg': did you mean 'zero3_init_flag'?" in said


@pytest.mark.slow
def test_a_build_that_was_killed_does_not_stop_later_launches(tmp_path: Path):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    launch = {"processes": 2, "config": "zero2.yaml", "environment": {"TORCH_EXTENSIONS_DIR": str(lock.parents[1])}}
    done = start(tmp_path, {**LORA, "max_steps": 1}, fresh=True, **launch)
    assert len(done.steps) == 1
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]  # nothing was compiled


@pytest.mark.slow
def test_a_port_in_use_is_no_obstacle_on_one_machine(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = start(tmp_path, LORA, processes=2, port=taken.getsockname()[1])
    assert done.environment["world_size"] == 2


@pytest.mark.slow
def test_a_port_in_use_is_named_where_no_launcher_looks_for_another(tmp_path: Path):
    recipe = write_recipe(tmp_path, TINY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run_command([sys.executable, "train/sft_opt.py", "--config", str(recipe)], place, fresh=True)
    assert done.returncode == 2, done.stderr
    assert f"error: MASTER_PORT {port} is in use on {socket.gethostname()}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_launchers_as_on_two_machines_give_the_figures_of_one_process(tmp_path: Path, rendezvous):
    one = start(tmp_path / "one", LORA)
    recipe, port = write_recipe(tmp_path / "two", LORA), free_port()
    where = {
        "static": ["--master_addr", "127.0.0.1", "--master_port", str(port)],
        "c10d": ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"127.0.0.1:{port}"],
    }[rendezvous]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launches = [
        subprocess.Popen(
            [*torchrun, "--node_rank", str(node), *where, "train/sft_opt.py", "--config", str(recipe)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [launch.communicate(timeout=120)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], "\n".join(said)
    two = Finished(0, said[0], said[1], tmp_path / "two" / "run")
    assert two.environment["world_size"] == 2
    figures = [[(x["step"], x["loss"], x["grad_norm"]) for x in done.steps] for done in (one, two)]
    assert figures[0] == figures[1]
