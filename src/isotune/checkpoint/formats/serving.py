"""What stands beside an exported language model, so that other servers ask it as it was trained."""

import shlex
from pathlib import Path
from typing import Any

from isotune.checkpoint.formats.ollama import MODELFILE, NotExpressible, modelfile
from isotune.checkpoint.formats.vllm import SCRIPT, NotServed, vllm_script
from isotune.io.files import replace_file
from isotune.models.finished_run import FinishedRun


def write_vllm(run: FinishedRun, folder: Path, name: str) -> str:
    """Write the script for vLLM into a folder of safetensors; returns the command, or why there is none.

    `run` has no base where the folder holds a whole model, and requests call it `name`.
    """
    try:
        replace_file(folder / SCRIPT, vllm_script(run, folder, name))
    except NotServed as why:
        return f"vLLM        no command: {why}"
    return f"vLLM        sh {shlex.quote(str(folder / SCRIPT))}"


def write_modelfile(model: Any, tokenizer: Any, folder: Path, source: str, name: str) -> str:
    """Write the Modelfile for Ollama beside the weights `source`; returns the command, or why there is none."""
    try:
        replace_file(folder / MODELFILE, modelfile(model, tokenizer, source))
    except NotExpressible as why:
        return f"Ollama      no {MODELFILE}: {why}"
    return f"Ollama      ollama create {shlex.quote(name)} -f {shlex.quote(str(folder / MODELFILE))}"
