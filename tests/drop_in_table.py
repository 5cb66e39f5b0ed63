"""Writes the tables of docs/drop-in.md: `python -m tests.drop_in_table` that of fields, with --matrix that of launches.

The second trains every kind of drop-in trainer on every launch, in some ten minutes on two cores.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from isotune.drop_in.fields import FIELDS, library_fields, owner_of
from tests.models_table import replaced_table, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "drop-in.md"
# the head of a column, and its launch: processes, configuration, rows and accumulation
LAUNCHES: dict[str, tuple[int, str, tuple[int, int]]] = {
    "one, 2 x 4": (0, "ddp.yaml", (2, 4)),
    "DDP, 4 x 1": (2, "ddp.yaml", (4, 1)),
    "DDP, 1 x 4": (2, "ddp.yaml", (1, 4)),
    "ZeRO-2, 4 x 1": (2, "zero2.yaml", (4, 1)),
    "ZeRO-2, 2 x 2": (2, "zero2.yaml", (2, 2)),
    "FSDP2, 4 x 1": (2, "fsdp2.yaml", (4, 1)),
    "FSDP2, 2 x 2": (2, "fsdp2.yaml", (2, 2)),
}
TITLES = {
    "packed": "SFT, packed",
    "padded": "SFT, one document a row",
    "chat": "chats, answers learnt",
    "messages": "prompt and completion",
    "text": "texts, every token learnt",
    "lora": "LoRA",
    "classes": "classes",
    "pairs": "pairs",
    "regression": "regression",
    "own loss": "a loss of logits of one's own",
}


def fields_table() -> str:
    """What becomes of each field of the installed libraries."""
    names = sorted(name for name in library_fields() if name in FIELDS)
    rows = [[f"`{name}`", owner_of(name), FIELDS[name].here, FIELDS[name].note] for name in names]
    return table(("field", "of", "here", "note"), rows)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The largest relative difference of the losses of the updates."""
    pairs = list(zip(found["losses"], expected["losses"], strict=True))
    largest = max(abs(one - other) / abs(other) for one, other in pairs)
    return f"{largest:.0e}" if largest else "0"


def matrix_table() -> str:
    """Every kind on every launch, against one process with the whole batch, and against the library."""
    from tests.distributed.test_drop_in_engines import KINDS, run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = run(folder, (8, 1))
        columns = {}
        for title, (processes, config, split) in LAUNCHES.items():
            columns[title] = run(folder, split, processes=processes, config=config)
            print(title, file=sys.stderr, flush=True)
        few, stock = (run(folder, (8, 1), which=which) for which in ("few", "stock"))
    rows = [
        [
            TITLES[kind],
            *(difference(own[kind], alone[kind]) for own in columns.values()),
            difference(few[kind], stock[kind]),
        ]
        for kind in KINDS
    ]
    return table(("kind", *LAUNCHES, "library, one"), rows)


if __name__ == "__main__":
    name, write = ("matrix", matrix_table) if "--matrix" in sys.argv else ("fields", fields_table)
    PAGE.write_text(replaced_table(PAGE.read_text(), name, write()))
