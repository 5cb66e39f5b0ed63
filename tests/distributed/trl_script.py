"""TRL's own trl/scripts/sft.py as it is installed, with one import changed: `SFTTrainer` is isotune's.

accelerate launch tests/distributed/trl_script.py --model_name_or_path ... --dataset_name ... --output_dir ...
"""

from pathlib import Path

import trl.scripts.sft

file = Path(str(trl.scripts.sft.__file__))
stock = "    from trl import SFTTrainer, get_dataset,"
source = file.read_text(encoding="utf-8")
assert source.count(stock) == 1, "TRL's script imports its trainer in another way now"
changed = source.replace(stock, "    from isotune import SFTTrainer\n    from trl import get_dataset,")
exec(compile(changed, str(file), "exec"), {"__name__": "__main__"})
