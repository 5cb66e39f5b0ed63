"""The command `isotune plan`: its flags and its output."""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from isotune.io import shipped
from isotune.io.errors import EXIT_USER_ERROR, UserError, shown
from isotune.io.variables import MAX_PROCESSES

EXAMPLES = """examples:
  isotune plan --config opt350m_lora                       a shipped recipe (`isotune ls`), or a file
  isotune plan --config opt350m_full --accelerate_config zero2 --world_size 8 --device A100-80 --price_per_hour 2.5
  isotune plan --config opt6.7b_qlora_24gb --gpu_memory 24GiB
  isotune plan --config opt350m_full --device H100 --compare zero2,zero3,fsdp2 --world_sizes 1,2,4,8,16,64 \\
      --picture scaling.png
  isotune plan --config RECIPE --learning_rate 1e-4        every key of the recipe is a flag (--help-all)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command itself; all others are keys of the recipe."""
    parser.add_argument("--config", metavar="FILE", help="recipe in YAML, or the name of a shipped one")
    engine = "configuration for accelerate launch, or the name of a shipped engine"
    parser.add_argument("--accelerate_config", metavar="FILE", help=engine)
    parser.add_argument("--world_size", type=int, metavar="N", help="processes in all (those of the configuration)")
    parser.add_argument("--per_node", type=int, default=8, metavar="N", help="processes of a node (%(default)s)")
    parser.add_argument("--gpu_memory", metavar="SIZE", help="what a process has, such as 24GiB (the device's)")
    parser.add_argument("--device", metavar="NAME", help="H100, A100-80, L4, RTX4090, ...: for seconds and hours")
    parser.add_argument("--measured", metavar="RUN", help="a finished run whose speed counts")
    parser.add_argument("--price_per_hour", type=float, metavar="X", help="of one process")
    parser.add_argument("--compare", metavar="A,B", default="", help="engines side by side: ddp,zero2,zero3,fsdp2,...")
    parser.add_argument("--world_sizes", metavar="N,N", default="", help="numbers of processes side by side")
    parser.add_argument("--picture", metavar="FILE", help="the comparison as a PNG")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace, flags: list[str]) -> int:
    """Print the report; exit status 2 where recipe or launch has a problem, UserError without a model or data."""
    # imported libraries live to the end: garbage collection over their objects took a tenth of the command's time
    gc.set_threshold(200_000, 20, 100)

    from isotune.preflight.preflight_report import run_preflight
    from isotune.preflight.render import as_json, draw_scaling, render_report
    from isotune.preflight.request import read_preflight_request
    from isotune.preflight.resources.devices import find_device
    from isotune.preflight.resources.memory import parse_bytes

    if not 1 <= chosen.per_node <= MAX_PROCESSES:
        raise UserError(f"--per_node is {chosen.per_node}: a node has from 1 to {MAX_PROCESSES:,} processes")
    if chosen.price_per_hour is not None and chosen.price_per_hour < 0:
        raise UserError(f"--price_per_hour is {chosen.price_per_hour:g}: it is 0 or a positive number")
    sizes = _numbers(chosen.world_sizes, "--world_sizes")
    limit = parse_bytes(chosen.gpu_memory, "--gpu_memory") if chosen.gpu_memory else None
    device = find_device(chosen.device) if chosen.device else None
    if chosen.measured and device is None:
        raise UserError("--measured needs --device: the share of its peak is taken from the run")
    picture = None if chosen.picture is None else _picture(chosen.picture)
    if picture is not None and not (chosen.compare or sizes):
        raise UserError("--picture shows a comparison: say --compare or --world_sizes")
    config, measured = (Path(path) if path else None for path in (chosen.config, chosen.measured))
    if config is not None:
        config = shipped.find(shipped.RECIPES, chosen.config) or config  # a file that is absent is named by its reader
    launch = chosen.accelerate_config
    if launch is not None:
        launch = str(shipped.find(shipped.ENGINES, launch) or launch)
    request = read_preflight_request(config, flags, launch, chosen.world_size)
    if request.chose_precision and device is not None:
        raise UserError("precision: auto is chosen where the run starts: say bf16: true or fp16: true to plan it")
    if request.guess:
        print(f"note        {request.guess}", file=sys.stderr)
    if request.recipe.tune != "full":
        _import_peft()
    if not request.recipe.model_name_or_path or not request.recipe.dataset_name:
        raise UserError("; ".join(request.problems))
    try:
        report = run_preflight(
            request,
            limit=limit,
            device=device,
            measured=measured,
            processes_per_node=chosen.per_node,
            compare=[name for name in chosen.compare.split(",") if name],
            world_sizes=sizes,
            show_progress=not chosen.json,
        )
    except UserError as error:
        # together with the problems of the recipe and the launch
        raise UserError("; ".join([*request.problems, str(error)])) from error
    render = (lambda *values: json.dumps(as_json(*values))) if chosen.json else render_report
    print(render(report, chosen.price_per_hour))
    if picture is not None:
        print(f"picture     {draw_scaling(report, picture)}", file=sys.stderr if chosen.json else sys.stdout)
    return EXIT_USER_ERROR if request.problems else 0


def _import_peft() -> None:
    """Import peft without torch's compiler, whose import takes longer than peft's own.

    bitsandbytes, which peft imports, compiles two functions at its import; the report calls neither.
    """
    import torch

    def no_compile(function: Any = None, **_: Any) -> Any:
        return function if function is not None else no_compile

    stock, torch.compile = torch.compile, no_compile
    try:
        import peft  # noqa: F401  (a later import finds it loaded)
    finally:
        torch.compile = stock


def _picture(name: str) -> Path:
    """The file of `--picture`; UserError for one that can be no PNG."""
    from isotune.io.reading import kind_of_file  # which imports yaml; --help is to be quick

    file = Path(name)
    if file.suffix.lower() not in ("", ".png"):
        raise UserError(f"--picture {name}: it is a PNG, so its name ends with .png")
    try:
        kind = kind_of_file(os.stat(file).st_mode)
    except NotADirectoryError:
        raise UserError(f"--picture {name}: what should be its folder is a file") from None
    except OSError:  # nothing is there; what else is wrong is said when it is written
        kind = "a file"
    if kind != "a file":
        raise UserError(f"--picture {name} is {kind}, not a file")
    return file


def _numbers(text: str, key: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word]
    if all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        numbers = [int(word) for word in words]
        if all(1 <= number <= MAX_PROCESSES for number in numbers):
            return numbers
    raise UserError(f"{key} is {shown(text)}: say whole numbers from 1 on with commas, such as 1,2,4,8")
