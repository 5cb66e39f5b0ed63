"""The file formats that rows are read from, known by the end of a file's name."""

from pathlib import PurePath

PLAIN_TEXT = ".txt"  # a line a row
DATA_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", PLAIN_TEXT)
OTHER_ENDS = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".pq": ".parquet"}  # that mean one of these
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # by Arrow's names
FORMAT_WORDS = f"{', '.join(DATA_FORMATS)} (also {' or '.join(COMPRESSIONS)})"


def format_of(name: str | PurePath) -> str | None:
    """The one of DATA_FORMATS that a file name ends in, whatever compresses it; None for another."""
    suffix = PurePath(base_name(name)).suffix.lower()
    suffix = OTHER_ENDS.get(suffix, suffix)
    return suffix if suffix in DATA_FORMATS else None


def compression_of(name: str | PurePath) -> str | None:
    """Arrow's name of the compression that a file name ends in; None where it names none."""
    return COMPRESSIONS.get(PurePath(name).suffix.lower())


def base_name(name: str | PurePath) -> str:
    """A file's name without the end that names its compression."""
    path = PurePath(name)
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name
