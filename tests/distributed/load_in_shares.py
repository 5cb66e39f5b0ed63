"""Loads a saved model as a run does, and writes down how much private memory that took on this rank at its peak.

accelerate launch --config_file ... tests/distributed/load_in_shares.py RECIPE.yaml OUT_FOLDER
"""

import json
import sys
import threading
import time
from pathlib import Path

from transformers import OPTForCausalLM  # noqa: F401  (what importing it takes is not measured)

from isotune.config import read_recipe
from isotune.distributed.engines import whole_numel
from isotune.distributed.launch import start_process
from isotune.models.opening import load_base_model, load_config


def private_bytes() -> int:
    """Memory of this process that is no file's: a mapped safetensors file is shared and can be dropped."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """The most private memory since it was started, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = private_bytes()
        self.done = False

    def run(self) -> None:
        """Until `done`."""
        while not self.done:
            self.most = max(self.most, private_bytes())
            time.sleep(0.002)


def main() -> None:
    """Load, measure, write."""
    recipe = read_recipe(["--config", sys.argv[1]], default_config=None, prog="load", description="load")
    process = start_process(recipe)
    config = load_config(recipe)
    peak = Peak()
    peak.start()
    model = load_base_model(recipe, config, process.loading_device(recipe))
    peak.done = True
    peak.join()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    found = {
        "peak_bytes": peak.most - peak.before,
        "parameters": sum(whole_numel(p) for p in model.parameters()),
        "held": sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in model.parameters()),
        "tied": embedding is head,
    }
    (Path(sys.argv[2]) / f"rank-{process.rank}.json").write_text(json.dumps(found))


main()
