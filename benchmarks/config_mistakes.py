"""How many wrong configurations are found before a run begins?

    python benchmarks/config_mistakes.py

Each case of benchmarks/mistakes/cases.py is read by `isotune plan` and by the libraries' own readers: TRL's and
transformers' argument parsers for the recipe, accelerate's loader and launch parser for its file, DeepSpeed's
configuration class and transformers' comparison with the arguments for the JSON. A case is found if the reader raises
an error; isotune must also name the key. The other readers get no keys that only isotune has, and no cases that are
mistakes only because of such keys.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from mistakes.cases import CASES, Case, write_case

OURS = {"model_name_or_path", "dataset_name", "max_seq_length", "tune", "global_batch_size", "microbatch_tokens",
        "model_init"}  # fmt: skip


def main() -> int:
    """Try every case, print a table and the JSON line."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore")
    caught: dict[str, Counter[str]] = {"isotune": Counter(), "stock": Counter()}
    missed: dict[str, list[str]] = {"isotune": [], "stock": []}
    cases = [case for case in CASES if not case.ours_alone]
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            files = write_case(case, Path(folder))
            for name, notices in (("isotune", isotune_notices), ("stock", stock_notices)):
                if quietly(notices, case, *files):
                    caught[name][case.kind] += 1
                else:
                    missed[name].append(f"{case.kind}: {case.expects}")
    kinds = Counter(case.kind for case in cases)
    print(f"{'':<16}{'cases':>8}{'isotune':>10}{'stock':>8}")
    for kind, count in kinds.items():
        print(f"{kind:<16}{count:>8}{caught['isotune'][kind]:>10}{caught['stock'][kind]:>8}")
    totals = {name: sum(found.values()) for name, found in caught.items()}
    print(f"{'together':<16}{len(cases):>8}{totals['isotune']:>10}{totals['stock']:>8}")
    print(json.dumps({"benchmark": "config_mistakes", "cases": len(cases), "caught": totals, "missed": missed,
                      "ratio": totals["isotune"] / max(totals["stock"], 1)}))  # fmt: skip
    return 0


def quietly(notices: Callable[[Case, Path, Path], bool], case: Case, recipe: Path, accelerate: Path) -> bool:
    """Ask without the libraries' talk."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return notices(case, recipe, accelerate)


def isotune_notices(case: Case, recipe: Path, accelerate: Path) -> bool:
    """Whether a plan names the key."""
    from isotune.io.errors import UserError
    from isotune.preflight.request import read_preflight_request

    try:
        problems = read_preflight_request(recipe, [], str(accelerate), None).problems
    except UserError as error:
        problems = (str(error),)
    return any(case.expects in problem for problem in problems)


def stock_notices(case: Case, recipe: Path, accelerate: Path) -> bool:
    """Whether any of the libraries' own readers raises an error."""
    readers: tuple[Callable[[], Any], ...] = (
        lambda: read_arguments(recipe),
        lambda: read_accelerate(accelerate),
        lambda: read_deepspeed(recipe, accelerate),
    )
    return any(raises(reader) for reader in readers)


def raises(reader: Callable[[], Any]) -> bool:
    """Whether a reader refuses."""
    try:
        reader()
    except (Exception, SystemExit):
        return True
    return False


def read_arguments(recipe: Path) -> Any:
    """TRL's parser over the arguments of SFTTrainer and of its model; `tune` becomes its own switches."""
    from transformers import HfArgumentParser
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    values = yaml.safe_load(recipe.read_text())
    theirs = {key: value for key, value in values.items() if key not in OURS}
    theirs |= {"use_peft": values.get("tune") != "full", "load_in_4bit": values.get("tune") == "qlora"}
    theirs |= {"use_cpu": True, "bf16": values.get("bf16", False)}
    renamed = {"r": "lora_r", "target_modules": "lora_target_modules"}
    words = {renamed.get(str(key), str(key)): value for key, value in theirs.items()}
    return HfArgumentParser([SFTConfig, ModelConfig]).parse_dict(words)  # type: ignore[arg-type]  (dataclasses, not their kind)


def read_accelerate(file: Path) -> Any:
    """accelerate's loader of its file, and the checks of its launch command."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    load_config_from_file(str(file))
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "script.py"]))


def read_deepspeed(recipe: Path, accelerate: Path) -> Any:
    """transformers' filling of DeepSpeed's file from the arguments, then DeepSpeed's own class."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    section = yaml.safe_load(accelerate.read_text()).get("deepspeed_config")
    if not section or "deepspeed_config_file" not in section:
        return None
    config = HfTrainerDeepSpeedConfig(json.loads(Path(section["deepspeed_config_file"]).read_text()))
    arguments, _ = read_arguments(recipe)
    config.trainer_config_process(arguments, auto_find_batch_size=False)
    config.trainer_config_finalize(arguments, None, 10)
    return DeepSpeedConfig(config.config)


if __name__ == "__main__":
    sys.exit(main())
