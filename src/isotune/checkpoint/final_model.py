"""Saving the final model: it counts as saved only after the files were read back and found equal, bit for bit.

A save can fail without an error: a sharded engine with LoRA writes empty tensors (peft issue 2450), tied weights get
lost, a configuration keeps settings of training. All of these show when the folder is loaded as its user will load it.
"""

import copy
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isotune.compat.peft import name_in_adapter_file, save_adapter
from isotune.compat.transformers import ignored_on_save, set_attention_of
from isotune.io.errors import NO_ROOM, RunFault, UserError
from isotune.io.files import remove_folder, set_aside, sync_path
from isotune.models.log_control import quiet_libraries

PROBE_TEXT = "### Human: Is 2 + 2 = 4?\n### Assistant: Yes: naïve, 世界 🙂.\n"


@dataclass(frozen=True)
class FinalModelReport:
    """What was saved and verified; tied tensors count once per name, their elements (`parameters`) once."""

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

    Everything is written to a sibling folder first, so at every moment `folder` is absent, as it was before, or the
    complete new model. Weights are safetensors in the dtype that they have in memory. The configuration is that of a
    stock model, without the attention function of training, and with `use_cache` on. `model` is a plain
    `PreTrainedModel` or `PeftModel`, out of its engine's wrapper; instance methods may be patched.

    Raises UserError where the disk has no room or the folder cannot be written, and RunFault where the files differ
    from memory: `folder` stays as it was, and they are kept beside it, under the name in the message.
    """
    from peft import PeftModel

    folder, is_adapter = Path(folder), isinstance(model, PeftModel)
    with quiet_libraries():
        if is_adapter:  # every trained tensor, not peft's own selection, which is what is checked
            own = {id(parameter): name for name, parameter in model.named_parameters()}
            expected: dict[str, Tensor] = {
                name: parameter
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if parameter.requires_grad or ".lora_" in name or ".modules_to_save." in name
                if ".token_adapter." not in name or name == own[id(parameter)]  # a tied head has the embedding's rows
            }
        else:  # tied ones under each of their names
            ignored = ignored_on_save(model)
            expected = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    empty = next((name for name, tensor in expected.items() if tensor.numel() == 0), None)
    if empty is not None:
        raise RunFault(
            f"{empty} is empty in memory, so {folder} was not written: a sharded engine has to gather it before saving"
        )
    with staging_for(folder) as staging:
        if is_adapter:
            save_adapter(model, staging)
        else:
            _save_model(model, staging)
        tokenizer.save_pretrained(str(staging))
        for name in ("config.json", "generation_config.json"):
            if (staging / name).is_file():
                _make_stock(staging / name)
    with quiet_libraries():
        try:
            _compare_files(expected, staging, is_adapter=is_adapter)
            _compare_reopened(model, expected, staging, is_adapter=is_adapter)
            _compare_tokenizer(tokenizer, staging)
        except _Difference as difference:
            raise RunFault(
                f"the model read back from {staging} is not the one in memory ({difference}): {folder} was not written"
            ) from difference
    replace_folder(staging, folder)
    return FinalModelReport(
        folder=folder,
        kind="adapter" if is_adapter else "model",
        tensors=len(expected),
        parameters=sum({(t.data_ptr(), t.shape): t.numel() for t in expected.values()}.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in expected.values()})),
        bytes_on_disk=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    )


def _save_model(model: Any, folder: Path) -> None:
    """`save_pretrained`, with a generation configuration that transformers finds invalid written as it is.

    Published ones are invalid (a temperature without do_sample), and `save_pretrained` refuses them once Trainer has
    set a token's id in them.
    """
    own: Any = getattr(model, "generation_config", None)
    if own is None or _is_valid(own):
        model.save_pretrained(str(folder))
        return
    model.generation_config = type(own)()
    try:
        model.save_pretrained(str(folder))
    finally:
        model.generation_config = own
    own.to_json_file(str(folder / "generation_config.json"), use_diff=True)


def _is_valid(generation_config: Any) -> bool:
    try:
        generation_config.validate(strict=True)
    except ValueError:
        return False
    return True


class _Difference(Exception):
    """Which tensor or file differs, and how."""


@contextmanager
def staging_for(folder: Path) -> Generator[Path]:
    """A sibling path of `folder` to write to; synced at the end, removed where the body fails."""
    staging = folder.with_name(f"{folder.name}.unverified")
    try:
        with quiet_libraries(), no_room_is_an_error(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_folder(staging)
            yield staging
            shared = staging.stat().st_mode & 0o666  # the umask's; safetensors makes its files the owner's alone
            for path in (*staging.rglob("*"), staging):
                if path.is_file():
                    path.chmod(shared)
                sync_path(path)
    except BaseException:
        remove_folder(staging)
        raise


def replace_folder(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`; a previous folder is removed only after that."""
    with no_room_is_an_error(folder):
        before = set_aside(folder)
        staging.rename(folder)
        sync_path(folder.parent)
    remove_folder(before)


@contextmanager
def no_room_is_an_error(folder: Path) -> Generator[None]:
    """Turn any library's error for a full disk, or for a folder that cannot be written, into a UserError.

    safetensors has a class of its own, with the errno in its message; torch.save raises a second error while it
    handles the first.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        named = {f"(os error {code})" for code in NO_ROOM}
        if any(getattr(c, "errno", None) in NO_ROOM or any(name in str(c) for name in named) for c in causes):
            raise UserError(
                f"no room on the disk for the model in {folder}: free some space or choose another folder"
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"the model cannot be written to {folder}: {os.strerror(error.errno)}") from error
        raise


def _make_stock(path: Path) -> None:
    """Remove from a configuration what training set: the packed attention and `use_cache: false`."""
    settings = json.loads(path.read_text("utf-8"))
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        settings.pop(key, None)
    if "use_cache" in settings:
        settings["use_cache"] = True
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _compare_files(expected: Mapping[str, Tensor], staging: Path, *, is_adapter: bool) -> None:
    """Compare the raw tensors of the files with those in memory, where their names are the same."""
    if not expected:
        raise _Difference("there is no tensor to save")
    in_memory = {name_in_adapter_file(name) if is_adapter else name: tensor for name, tensor in expected.items()}
    files = sorted(staging.glob("*.safetensors"))
    if not files:
        raise _Difference("no safetensors file was written")
    for file in files:
        with cast(Any, safe_open)(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                read = tensors.get_tensor(name)
                if read.numel() == 0:
                    raise _Difference(f"{name} is empty in {file.name}")
                if name in in_memory:
                    _compare(name, in_memory.pop(name), read, same_dtype=True)
    if in_memory and is_adapter:
        raise _Difference(f"{next(iter(in_memory))} was not written")


def _compare_reopened(model: Any, expected: Mapping[str, Tensor], staging: Path, *, is_adapter: bool) -> None:
    """Load the folder as its user will, and compare every tensor by its name in memory."""
    reopened = _reopen_adapter(model, staging) if is_adapter else _reopen_model(model, staging)
    # `from_pretrained` loads all weights in one dtype, and peft adapters in fp32; `_compare_files` compared the dtypes.
    one_dtype = len({tensor.dtype for tensor in expected.values() if tensor.is_floating_point()}) == 1
    same_dtype = one_dtype and not is_adapter
    for name, tensor in expected.items():
        if name not in reopened:
            raise _Difference(f"{name} is missing")
        _compare(name, tensor, reopened[name], same_dtype=same_dtype)


def _reopen_model(model: Any, staging: Path) -> dict[str, Tensor]:
    reopened, loaded = cast(Any, type(model)).from_pretrained(
        str(staging), dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    mismatched = sorted(loaded["missing_keys"]) + sorted(loaded["unexpected_keys"])
    if mismatched:
        raise _Difference(f"{mismatched[0]} is missing or not known to {type(model).__name__}")
    if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        head, embedding = reopened.get_output_embeddings().weight, reopened.get_input_embeddings().weight
        was_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        if was_tied and head is not embedding:
            raise _Difference("the head is no longer tied to the embedding")
    return reopened.state_dict()


def _reopen_adapter(model: Any, staging: Path) -> dict[str, Tensor]:
    """Load the adapter with peft onto a base of the same class, whose memory is never touched, so never resident."""
    from peft import PeftModel

    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    set_attention_of(config, "eager")
    with torch.device("meta"):
        skeleton = type(base)(config)
    skeleton.to_empty(device="cpu")
    reopened = cast(Any, PeftModel).from_pretrained(skeleton, str(staging), torch_device="cpu")
    return dict(reopened.named_parameters(remove_duplicate=False))


def _compare(name: str, in_memory: Tensor, read: Tensor, *, same_dtype: bool) -> None:
    if in_memory.shape != read.shape:
        raise _Difference(f"{name} has the shape {list(read.shape)} and not {list(in_memory.shape)}")
    if same_dtype and in_memory.dtype != read.dtype:
        raise _Difference(f"{name} is {read.dtype} and not {in_memory.dtype}")
    expected = in_memory.detach().to(device="cpu", dtype=read.dtype).contiguous()
    actual = read.detach().cpu().contiguous()
    # as bytes: NaN equals itself, and 0.0 differs from -0.0
    if not torch.equal(expected.reshape(-1).view(torch.uint8), actual.reshape(-1).view(torch.uint8)):
        raise _Difference(f"{name} has other values")


def _compare_tokenizer(tokenizer: Any, staging: Path) -> None:
    from transformers import AutoTokenizer

    reopened = cast(Any, AutoTokenizer).from_pretrained(str(staging), local_files_only=True)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(reopened, role) != getattr(tokenizer, role):
            raise _Difference(f"the tokenizer's {role} is {getattr(reopened, role)}, not {getattr(tokenizer, role)}")
    if reopened.chat_template != tokenizer.chat_template:
        raise _Difference("the tokenizer's chat template is another one")
    if reopened(PROBE_TEXT)["input_ids"] != tokenizer(PROBE_TEXT)["input_ids"]:
        raise _Difference("the tokenizer encodes text in another way")
