"""The final model is called saved only after what lies on the disk was opened again and found equal, bit for bit.

A save can fail without an error: a sharded engine with LoRA writes empty tensors (peft issue 2450), tied weights get
lost, a configuration keeps what only training understands. All of these show up when the folder is read as its user
will read it.
"""

import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isotune.io.errors import RunFault, UserError
from isotune.io.files import sync_path
from isotune.models.log_control import quiet_libraries

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_TEXT = "### Human: Is 2 + 2 = 4?\n### Assistant: Yes: naïve, 世界 🙂.\n"


@dataclass(frozen=True)
class FinalModelReport:
    """What was saved and verified.

    Attributes:
        folder: where it lies.
        kind: a whole model, or an adapter that needs its base model.
        tensors: tensors compared with the model in memory; tied ones count once a name.
        parameters: numbers in them.
        dtypes: of the tensors, as torch names them, sorted.
        bytes_on_disk: of all files of the folder.
    """

    folder: Path
    kind: Literal["model", "adapter"]
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    bytes_on_disk: int

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.tensors} tensors, {self.parameters:,} parameters in {' and '.join(self.dtypes)}, "
            f"{self.bytes_on_disk / 1e6:.1f} MB; read back equal bit for bit"
        )


def save_and_verify(model: nn.Module, tokenizer: Any, folder: str | Path) -> FinalModelReport:
    """Write a model or a peft adapter with its tokenizer, reopen it, compare every tensor, and rename it into place.

    Everything is written to a sibling folder first, so `folder` is at every moment absent, the whole of what was
    there before, or the whole new model. Weights are safetensors in the dtype that they have in memory. The
    configuration is that of a stock model: no trace of the attention function of training, and `use_cache` on.

    Args:
        model: a plain `PreTrainedModel` or `PeftModel`, not wrapped by an engine; instance methods may be patched.
        tokenizer: of the model.
        folder: what `from_pretrained` will be given; an existing one is replaced.

    Raises:
        UserError: the disk has no room, or the folder cannot be written.
        RunFault: what was read back is not what is in memory; the folder before it stays, and what was written is
            kept beside it under the name that the sentence gives.
    """
    folder = Path(folder)
    staging = folder.with_name(f"{folder.name}.unverified")
    with quiet_libraries():
        expected = _trained_adapter(model) if _is_adapter(model) else _whole_state(model)
    empty = next((name for name, tensor in expected.items() if tensor.numel() == 0), None)
    if empty is not None:
        raise RunFault(
            f"{empty} is empty in memory, so {folder} was not written: a sharded engine has to gather it before saving"
        )
    try:
        with quiet_libraries(), no_room_is_an_error(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            _write(model, tokenizer, staging)
            sync_folder(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    with quiet_libraries():
        try:
            _compare_files(model, expected, staging)
            _compare_reopened(model, expected, staging)
            _compare_tokenizer(tokenizer, staging)
        except _Difference as difference:
            raise RunFault(
                f"the model read back from {staging} is not the one in memory ({difference}): {folder} was not written"
            ) from difference
    replace_folder(staging, folder)
    return FinalModelReport(
        folder=folder,
        kind="adapter" if _is_adapter(model) else "model",
        tensors=len(expected),
        parameters=sum(tensor.numel() for tensor in _distinct(expected)),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in expected.values()})),
        bytes_on_disk=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    )


class _Difference(Exception):
    """Which tensor or file differs, and how."""


def sync_folder(folder: Path) -> None:
    """fsync `folder` and every file and folder below it."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def replace_folder(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`; what was there is removed only after that."""
    before = folder.with_name(f"{folder.name}.before")
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    staging.rename(folder)
    sync_path(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def no_room_is_an_error(folder: Path) -> Iterator[None]:
    """A full disk is the user's to clear, whichever class of error a library makes of it.

    safetensors has its own, with the number in its text; torch.save raises another on the way out of the first.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        if any(_says_no_room(cause) for cause in causes):
            raise UserError(
                f"no room on the disk for the model in {folder}: free some space or choose another folder"
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"the model cannot be written to {folder}: {os.strerror(error.errno)}") from error
        raise


def _says_no_room(error: BaseException) -> bool:
    return getattr(error, "errno", None) in NO_ROOM or any(f"(os error {code})" in str(error) for code in NO_ROOM)


def _is_adapter(model: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _write(model: Any, tokenizer: Any, staging: Path) -> None:
    if _is_adapter(model):
        # "auto" would ask the Hub for the base model's vocabulary size; trained embeddings are in modules_to_save.
        targets = next(iter(model.peft_config.values())).target_modules or ()
        model.save_pretrained(str(staging), save_embedding_layers=bool({"embed_tokens", "lm_head"} & set(targets)))
    else:
        model.save_pretrained(str(staging))
    tokenizer.save_pretrained(str(staging))
    for name in ("config.json", "generation_config.json"):
        if (staging / name).is_file():
            _make_stock(staging / name)


def _make_stock(path: Path) -> None:
    """Take out of a configuration what training put there: the packed attention and the cache turned off."""
    settings = json.loads(path.read_text("utf-8"))
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        settings.pop(key, None)
    if "use_cache" in settings:
        settings["use_cache"] = True
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model that is saved, tied ones under each of their names."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}


def _trained_adapter(model: nn.Module) -> dict[str, Tensor]:
    """Every trained tensor by the name that it has in the peft model, taken without peft's own selection."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or ".lora_" in name or ".modules_to_save." in name
    }


def _distinct(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors.values()}.values())


def _compare_files(model: nn.Module, expected: Mapping[str, Tensor], staging: Path) -> None:
    """Compare the raw tensors of the files with those in memory, where their names are the same."""
    if not expected:
        raise _Difference("there is no tensor to save")
    in_memory = {_name_in_file(model, name): tensor for name, tensor in expected.items()}
    files = sorted(staging.glob("*.safetensors"))
    if not files:
        raise _Difference("no safetensors file was written")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                read = tensors.get_tensor(name)
                if read.numel() == 0:
                    raise _Difference(f"{name} is empty in {file.name}")
                if name in in_memory:
                    _compare(name, in_memory.pop(name), read, same_dtype=True)
    if in_memory and _is_adapter(model):
        raise _Difference(f"{next(iter(in_memory))} was not written")


def _name_in_file(model: nn.Module, name: str) -> str:
    if not _is_adapter(model):
        return name
    name = re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name)
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name  # DoRA, peft 0.21


def _compare_reopened(model: Any, expected: Mapping[str, Tensor], staging: Path) -> None:
    """Load the folder as its user will, and compare under every name that the model in memory has."""
    reopened = _reopen_adapter(model, staging) if _is_adapter(model) else _reopen_model(model, staging)
    # `from_pretrained` gives all weights one dtype and peft gives adapters fp32; the files' own were compared before.
    one_dtype = len({tensor.dtype for tensor in expected.values() if tensor.is_floating_point()}) == 1
    same_dtype = one_dtype and not _is_adapter(model)
    for name, tensor in expected.items():
        if name not in reopened:
            raise _Difference(f"{name} is missing")
        _compare(name, tensor, reopened[name], same_dtype=same_dtype)


def _reopen_model(model: Any, staging: Path) -> dict[str, Tensor]:
    reopened, loaded = type(model).from_pretrained(
        str(staging), dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    wrong = sorted(loaded["missing_keys"]) + sorted(loaded["unexpected_keys"])
    if wrong:
        raise _Difference(f"{wrong[0]} is missing or not known to {type(model).__name__}")
    if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        head, embedding = reopened.get_output_embeddings().weight, reopened.get_input_embeddings().weight
        was_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        if was_tied and head is not embedding:
            raise _Difference("the head is no longer tied to the embedding")
    return reopened.state_dict()


def _reopen_adapter(model: Any, staging: Path) -> dict[str, Tensor]:
    """Load the adapter by peft on top of a base of the same class: its names must fit.

    The base's memory is reserved and never touched, so it does not become resident: this costs the adapter only.
    """
    from peft import PeftModel

    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        skeleton = type(base)(config)
    skeleton.to_empty(device="cpu")
    reopened = PeftModel.from_pretrained(skeleton, str(staging), torch_device="cpu")
    return dict(reopened.named_parameters(remove_duplicate=False))


def _compare(name: str, in_memory: Tensor, read: Tensor, *, same_dtype: bool) -> None:
    if in_memory.shape != read.shape:
        raise _Difference(f"{name} has the shape {list(read.shape)} and not {list(in_memory.shape)}")
    if same_dtype and in_memory.dtype != read.dtype:
        raise _Difference(f"{name} is {read.dtype} and not {in_memory.dtype}")
    wanted = in_memory.detach().to(device="cpu", dtype=read.dtype).contiguous()
    found = read.detach().cpu().contiguous()
    # Bytes and not numbers: NaN equals itself and 0.0 differs from -0.0.
    if not torch.equal(wanted.reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8)):
        raise _Difference(f"{name} holds other numbers")


def _compare_tokenizer(tokenizer: Any, staging: Path) -> None:
    from transformers import AutoTokenizer

    reopened = AutoTokenizer.from_pretrained(str(staging), local_files_only=True)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(reopened, role) != getattr(tokenizer, role):
            raise _Difference(f"the tokenizer's {role} is {getattr(reopened, role)}, not {getattr(tokenizer, role)}")
    if reopened(PROBE_TEXT)["input_ids"] != tokenizer(PROBE_TEXT)["input_ids"]:
        raise _Difference("the tokenizer cuts text in another way")
