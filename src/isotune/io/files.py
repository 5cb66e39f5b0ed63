"""Files that are whole or not there: written beside their place, forced to the disk, and put there at one stroke."""

import os
from pathlib import Path


def write_synced(path: Path, text: str) -> None:
    """Write a text file and force it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Put `text` in the place of a file at one stroke: a reader finds the old one or the new one, never half of it."""
    staging = path.with_name(f".{path.name}.tmp")
    write_synced(staging, text)
    staging.replace(path)
