"""RUN/samples.json: what a finished run's model says of the texts that its recipe names, for people to look at."""

import json
from collections.abc import Sequence
from pathlib import Path

from isotune.io.files import replace_file
from isotune.io.reading import Unreadable, read_json_object

SAMPLES = "samples.json"
Sample = dict[str, str]  # `input`, `output`, and with them what else is known of it in words, such as `true`


def write_samples(run: Path, samples: Sequence[Sample]) -> None:
    """Replace the samples of a run, atomically."""
    content = {"samples": list(samples)}
    replace_file(run / SAMPLES, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_samples(run: Path) -> list[Sample]:
    """The samples of a run; none where it has no such file, or the file is broken."""
    try:
        samples = read_json_object(run / SAMPLES, run).get("samples")
    except (FileNotFoundError, Unreadable):
        return []
    rows = samples if isinstance(samples, list) else []
    return [
        {str(name): str(value) for name, value in row.items()}
        for row in rows
        if isinstance(row, dict) and {"input", "output"} <= row.keys()
    ]
