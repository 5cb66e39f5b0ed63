"""What is done to a run between two attempts: its newest checkpoint is harmed, or its disk is full."""

import contextlib
import os
import subprocess
from pathlib import Path

from isotune.checkpoint.store import CheckpointStore
from kills.drawing import FLIPPED, TRUNCATED

DISK_BYTES = 96 * 2**20
FILLER = "filler"


def harm_newest(run: Path, harm: str, place: float) -> str | None:
    """Truncate a file of the newest checkpoint, or flip a bit of it; says which. None where there is no checkpoint."""
    folders = CheckpointStore(run / "checkpoints").folders()
    if not folders:
        return None
    files = [path for path in sorted(folders[-1].rglob("*")) if path.is_file() and path.stat().st_size]
    file = files[int(place * len(files))]
    content = bytearray(file.read_bytes())
    at = int((place * len(files)) % 1 * len(content))
    if harm == TRUNCATED:
        del content[at:]
    else:
        assert harm == FLIPPED
        content[at] ^= 1 << (at % 8)
    file.write_bytes(content)
    return f"{harm} at byte {at}: {file.relative_to(folders[-1].parent)}"


@contextlib.contextmanager
def small_disk(folder: Path):
    """A disk of memory on `folder`, where this user may mount one; whether it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(folder):  # this program was killed
        subprocess.run(["umount", "-l", str(folder)], check=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full_but_for(disk: Path, free_bytes: int):
    """Meanwhile the disk has no more room than this."""
    filler = disk / FILLER
    room = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(room.f_bavail * room.f_frsize - free_bytes, 1))
    try:
        yield
    finally:
        filler.unlink()
