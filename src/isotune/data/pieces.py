"""Documents that are made piece by piece: tokenised in threads, their tokens written to disk as they come.

So Python reads one batch while Rust tokenises others, and the memory that preparation takes does not grow with the
tokens; a document keeps a few numbers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from isotune.data.documents import Documents, starts_of
from isotune.io.cache_root import disk_errors_named

THREADS = 2  # that tokenise; each uses all cores by the tokenizer's own threads
Item = TypeVar("Item")
Made = TypeVar("Made")


def in_threads(items: Iterable[Item], work: Callable[[Item], Made]) -> Iterator[tuple[Item, Made]]:
    """Each item with what `work` makes of it, in order; few items are held at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        running: deque[tuple[Item, Future[Made]]] = deque()
        for item in items:
            running.append((item, threads.submit(work, item)))
            if len(running) > THREADS:
                oldest, future = running.popleft()
                yield oldest, future.result()
        for oldest, future in running:
            yield oldest, future.result()


class DocumentFiles:
    """Documents whose tokens are files of a folder, as the cache keeps arrays: input_ids.npy, and supervised.npy.

    Documents that have labels have these in memory, as everything else of which a document has one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, tuple[BinaryIO, np.dtype[Any]]] = {}
        self._of_documents: dict[str, list[np.ndarray]] = {}

    def add(self, part: Documents) -> None:
        """Append documents; all parts have the same columns. UserError where the disk has no room."""
        arrays = part.as_arrays()
        del arrays["starts"]
        with disk_errors_named(self.folder):
            for name in self._token_arrays(part):
                self._append(name, arrays.pop(name))
        for name, array in {**arrays, "lengths": part.lengths}.items():
            self._of_documents.setdefault(name, []).append(array)

    def documents(self) -> Documents:
        """All of them, their tokens mapped from disk; nothing is added from then on."""
        arrays = {name: np.concatenate(parts) for name, parts in self._of_documents.items()}
        arrays["starts"] = starts_of(arrays.pop("lengths"))
        tokens = int(arrays["starts"][-1])
        with disk_errors_named(self.folder):
            for name, (file, dtype) in self._files.items():
                file.seek(0)
                _write_header(file, dtype, tokens)
                file.close()
                arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return Documents.from_arrays(arrays)

    def close(self) -> None:
        """Close what an error left open."""
        for file, _ in self._files.values():
            file.close()

    @staticmethod
    def _token_arrays(part: Documents) -> tuple[str, ...]:
        return ("input_ids",) if part.has_labels else ("input_ids", "supervised")

    def _append(self, name: str, array: np.ndarray) -> None:
        if name not in self._files:
            file = (self.folder / f"{name}.npy").open("wb")
            self._files[name] = file, array.dtype
            _write_header(file, array.dtype, 0)
        file, dtype = self._files[name]
        assert array.dtype == dtype, f"{name} changes its type"
        file.write(np.ascontiguousarray(array).data)


def _write_header(file: BinaryIO, dtype: "np.dtype[Any]", length: int) -> None:
    """The header of an .npy file; numpy leaves room for any length of the first axis."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
