"""Packages that only some uses need: a missing one is one sentence with the command that installs it."""

from importlib.util import find_spec

from isotune.io.errors import UserError

# package as it is imported -> the extra of pyproject.toml that brings it
EXTRAS = {
    "deepspeed": "deepspeed",
    "bitsandbytes": "qlora",
    "evaluate": "eval",
    "sacrebleu": "eval",
    "rouge_score": "eval",
    "lm_eval": "lm-eval",
    "nltk": "arena",
    "simplemma": "arena",
    "skops": "arena",
    "flash_attn": "flash-attn",
    "optuna": "sweep",
    "starlette": "serve",
    "uvicorn": "serve",
    "onnxscript": "export",
    "onnxruntime": "export",
    "gguf": "export",
}


def need(package: str, what: str) -> None:
    """UserError where `package` is not installed: `what` needs it, and this is how to get it. Nothing is imported."""
    try:
        installed = find_spec(package) is not None
    except ValueError:  # a module without a spec, as a test may leave it
        installed = True
    if not installed:
        raise UserError(f"{what} needs {package}: {install_command(package)}")


def install_command(package: str) -> str:
    """The command that installs the extra of a package."""
    return f"pip install 'isotune[{EXTRAS[package]}]'"
