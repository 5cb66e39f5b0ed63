"""The vLLM command that serves an exported language model as it was trained."""

import shlex
from pathlib import Path

from isotune.models.adapters.stored import read_adapter_config
from isotune.models.finished_run import FinishedRun

SCRIPT = "vllm.sh"
CHAT_TEMPLATE = "chat_template.jinja"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


class NotServed(Exception):
    """Why vLLM cannot serve it, as a sentence without its period."""


def vllm_script(run: FinishedRun, folder: Path, name: str) -> str:
    """A shell script that stands beside the exported files in `folder`; `name` is what requests call the model.

    It finds its folder by itself, so that both may be moved; what follows it on the command line is vLLM's. NotServed
    says why there is none.
    """
    words = ['"$here"', "--served-model-name", shlex.quote(name)] if run.base is None else _adapter(run, folder, name)
    if not (folder / CHAT_TEMPLATE).is_file():  # an adapter that an earlier version or another program wrote
        how = "" if run.base is None else ", so its base's would ask it: export it with --merge"
        raise NotServed(f"its files have no {CHAT_TEMPLATE}{how}")
    words += ["--chat-template", f'"$here"/{CHAT_TEMPLATE}']
    return "\n".join(
        [
            "#!/bin/sh",
            "# Serves the model as it was trained: asked by the run's chat template, without the sampling rules of its",
            "# base's generation_config.json. It was evaluated at temperature 0.",
            'here=$(cd "$(dirname "$0")" && pwd)',
            f'exec vllm serve {" ".join(words)} --generation-config vllm "$@"',
            "",
        ]
    )


def _adapter(run: FinishedRun, folder: Path, name: str) -> list[str]:
    """The words that load an adapter on its base; requests that name `name` get it."""
    config, settings = read_adapter_config(folder), run.settings
    if "chat_format" not in settings:
        raise NotServed("it may carry its base's chat template, and not the form that it was trained in: --merge")
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    rank = max([int(config.get("r") or 0), *ranks.values()])
    refused = {
        "DoRA": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none",
        "whole modules beside its matrices (modules_to_save)": config.get("modules_to_save"),
        "rows of new tokens": config.get("trainable_token_indices"),
        f"the rank {rank}": rank > RANKS[-1],
    }
    if why := next((what for what, is_there in refused.items() if is_there), None):
        raise NotServed(f"vLLM serves no adapter with {why}: export it with --merge")
    base = Path(str(run.base))  # as the adapter's configuration names it
    words = [shlex.quote(str(base.resolve() if base.is_dir() else run.base)), "--tokenizer", '"$here"', "--enable-lora"]
    words += ["--lora-modules", f'{shlex.quote(name)}="$here"']
    words += ["--max-lora-rank", str(next(size for size in RANKS if size >= rank))]
    if run.base_commit is not None:
        words[1:1] = ["--revision", run.base_commit]
    if settings.get("tune") == "qlora" and not run.base_made_here:  # such a base was never in 4 bits
        if settings.get("bnb_4bit_quant_type", "nf4") != "nf4" or not settings.get("bnb_4bit_use_double_quant", True):
            raise NotServed("vLLM's own 4 bits are nf4 with double quantization, and others were trained on: --merge")
        words += ["--quantization", "bitsandbytes"]
    return words
