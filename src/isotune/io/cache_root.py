"""Where isotune caches what it can make again, and the sentence for a disk that does not take it."""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from isotune.io.errors import UserError, as_user_error

DISKS = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "has reached your quota",
    errno.EROFS: "is read-only",
    errno.EFBIG: "takes no file so large",
}


def cache_root() -> Path:
    """`$ISOTUNE_CACHE`, by default `~/.cache/isotune`."""
    return Path(os.environ.get("ISOTUNE_CACHE") or Path.home() / ".cache" / "isotune").expanduser()


@contextmanager
def disk_errors_named(folder: Path) -> Generator[None]:
    """Turn an error of the disk into the sentence that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in DISKS:
            reason = f"the disk of {folder} {DISKS[error.errno]}"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST) or as_user_error(error, folder) is not None:
            reason = f"the folder {folder} cannot be written ({error.strerror})"
        else:
            raise
        raise UserError(f"{reason}: make room or set ISOTUNE_CACHE to another folder") from error
