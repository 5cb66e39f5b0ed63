"""`model.pt`: a state dict for `torch.load(weights_only=True)` and `load_state_dict`."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from isotune.checkpoint.final_model import replace_folder, staging_for
from isotune.io.errors import RunFault
from isotune.models.log_control import quiet_libraries

STATE_DICT = "model.pt"


def save_state_dict(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write `model.pt`, load it as its user will into a new model, compare, and rename the folder into place."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    with staging_for(folder) as staging:
        staging.mkdir()
        save_settings(model, tokenizer, staging)
        # Tied tensors share one storage in the file and keep both names: `load_state_dict` needs both.
        # A file opened by Python, because torch's own hides why a write failed.
        written = staging / STATE_DICT
        with written.open("wb") as file:
            torch.save(state, file)
        read = torch.load(written, weights_only=True, map_location="cpu")
        with torch.device("meta"):
            fresh = type(model)(model.config)
        try:
            fresh.load_state_dict(read, strict=True, assign=True)
        except RuntimeError as error:
            raise RunFault(f"{written} does not load into {type(model).__name__}: {error}") from error
        for name, tensor in state.items():
            if read[name].dtype != tensor.dtype or not torch.equal(read[name], tensor.cpu()):
                raise RunFault(f"{name} read back from {written} is not the one in memory")
    replace_folder(staging, folder)


def save_settings(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what stands beside weights: the configuration of a stock model, how it generates, and its tokenizer."""
    if getattr(model.config, "use_cache", None) is not None:
        model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(str(folder))
    if model.can_generate():
        model.generation_config.to_json_file(str(folder / "generation_config.json"), use_diff=True)  # valid or not
    tokenizer.save_pretrained(str(folder))


def load_state_dict_file(folder: Path, *, is_classifier: bool) -> Any:
    """The model of a folder with `model.pt`, made as its user makes it, in fp32."""
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    with quiet_libraries():
        model = cast(Any, auto).from_config(cast(Any, AutoConfig).from_pretrained(str(folder)), dtype=torch.float32)
        model.load_state_dict(torch.load(folder / STATE_DICT, weights_only=True, map_location="cpu"), strict=True)
    return model.eval()
