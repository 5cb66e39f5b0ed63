"""Repositories of the Hugging Face Hub: one commit in a whole launch, each file fetched once, and what was read.

A name stands for another commit whenever somebody pushes. So a launch asks once (`open_repository`), and everything
that it reads of a repository is of that commit: configuration, tokenizer and weights, on every rank. Which files those
are is decided once too, under a lock that all processes of a machine share (`fetch`), and read from the Hub's cache.

    $ISOTUNE_CACHE/hub/models--OWNER--NAME/COMMIT/PART.json      the files of a part that are in the Hub's cache
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from isotune.data.sources.hub_access import (
    Kind,
    answered,
    go_offline,
    hub_errors_named,
    hub_reached,
    is_offline,
    named,
    wait_if_told,
)
from isotune.io.cache_root import cache_root, disk_errors_named
from isotune.io.errors import UserError, is_first_process
from isotune.io.files import replace_file
from isotune.io.locks import held
from isotune.io.reading import Unreadable, read_json_object

OFFLINE_WAYS = {
    "model": "give a local folder that holds it, or builtin:NAME",
    "dataset": "give a folder, a .jsonl, .csv or .parquet file, or builtin:NAME",
}


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    kind: Kind
    name: str
    revision: str | None  # branch, tag or commit that was asked for; None is the default branch
    commit: str

    @property
    def folder(self) -> Path:
        """Where the Hub's cache keeps the files of this commit."""
        return _cached_repository(self.kind, self.name) / "snapshots" / self.commit

    @property
    def what(self) -> str:
        """How an error sentence names it."""
        return named(self.kind, self.name)

    def mark_read(self, files: Iterable[str]) -> None:
        """Note in `hub_record` that this process reads these files."""
        _read.setdefault(self, {}).update(dict.fromkeys(files))


_opened: dict[tuple[str, ...], tuple[str, str]] = {}  # by cache, endpoint, kind, name, revision: name now, commit
_read: dict[Repository, dict[str, None]] = {}  # the files of each repository that this process has read, in order


def is_hub_id(dataset_name: str) -> bool:
    """Whether a name has the form of a Hub id, `NAME` or `OWNER/NAME`, and cannot be meant as a path."""
    parts = dataset_name.split("/")
    return (
        1 <= len(parts) <= 2
        and not dataset_name.startswith((".", "~", os.sep))
        and all(part and all(letter.isalnum() or letter in "-_." for letter in part) for part in parts)
    )


def open_repository(kind: Kind, name: str, revision: str | None = None, *, key: str | None = None) -> Repository:
    """The repository at the commit that `revision` stands for now, or stood for when this launch first asked.

    Without the Hub the commit is the one that the cache knows. UserError, which begins with the recipe's `key`, where
    there is no such repository or revision, or neither the Hub nor a cached copy can be reached.
    """
    place = _place(kind, name, revision)
    if place not in _opened:
        with hub_errors_named(kind, name, revision, prefix := f"{key}: " if key else ""):
            now = name if "/" in name else _present_name(kind, name)
            _opened[place] = now, _find_commit(kind, now, revision, prefix)
    now, commit = _opened[place]
    return Repository(kind, now, revision, commit)


def opened_repositories() -> list[tuple[Kind, str, str | None, str, str]]:
    """What this process has opened: kind, name, revision, present name, commit."""
    found: list[Any] = [(kind, name, at or None, *rest) for (*_, kind, name, at), rest in _opened.items()]
    return found


def open_at(opened: Iterable[tuple[Kind, str, str | None, str, str]]) -> None:
    """Open these repositories, as `opened_repositories` gives them, at these commits from now on."""
    for kind, name, revision, now, commit in opened:
        _opened[_place(kind, name, revision)] = now, commit


def fetch(
    repository: Repository, part: str, choose: Callable[[bool], dict[str, Any]], *, read: bool = True
) -> dict[str, Any]:
    """Have the files of a part of a repository in the Hub's cache; returns what `choose` said, the list `files` in it.

    `choose`, given whether the Hub can be asked (else only what is cached counts), says which files are the part, and
    whatever else should be remembered of it; it is called once on a machine. They are on record as `read`.
    """
    memo = cache_root() / "hub" / _cached_repository(repository.kind, repository.name).name / repository.commit
    memo /= f"{part}.json"
    found = _remembered(memo, repository)
    if found is None and (is_offline(repository.kind) or not hub_reached()):
        found = choose(False)
    elif found is None:
        with held(memo.with_suffix(".lock")):
            found = _remembered(memo, repository)
            if found is None:
                found = wait_if_told(lambda: choose(True))
                for file in found["files"]:
                    download(repository, file)
                with disk_errors_named(memo.parent):
                    replace_file(memo, json.dumps(found, indent=1) + "\n")
    if read:
        repository.mark_read(found["files"])
    return found


def download(repository: Repository, file: str, prefix: str = "") -> Path:
    """One file of a repository, from the cache where it is there; `prefix` begins the sentence of a UserError."""
    from huggingface_hub import HfApi

    with hub_errors_named(repository.kind, repository.name, repository.revision, prefix):
        return Path(
            cast(Any, HfApi()).hf_hub_download(
                repository.name, file, repo_type=repository.kind, revision=repository.commit
            )
        )


def files_of(repository: Repository, ask_hub: bool) -> list[str]:
    """The paths of all files of a repository; of those that are cached where the Hub is not to be asked."""
    if not ask_hub:
        folder = repository.folder
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    from huggingface_hub import HfApi

    with hub_errors_named(repository.kind, repository.name, repository.revision):
        return HfApi().list_repo_files(repository.name, repo_type=repository.kind, revision=repository.commit)


def hub_record() -> list[dict[str, Any]]:
    """What this process has read of the Hub, for environment.json: name, revision, commit and SHA-256 of each file.

    Where the Hub names a file by its SHA-256, as it does large ones, the cached copy must have it: UserError.
    """
    return [
        {
            "repository": repository.name,
            "kind": repository.kind,
            "revision": repository.revision or "main",
            "commit": repository.commit,
            "files": {file: _checked_digest(repository, file) for file in files},
        }
        for repository, files in _read.items()
    ]


def open_as_recorded(environment: dict[str, Any], names: Iterable[str]) -> None:
    """Open the repositories of these names at the commits that the environment.json of a run records for them."""
    for entry in environment.get("hub") or ():
        kind, now, revision = entry["kind"], entry["repository"], entry["revision"]
        for name in names:  # some may have moved since
            if _moved(kind, name) == now:
                revisions = ("main", None) if revision == "main" else (revision,)
                open_at((kind, name, each, now, entry["commit"]) for each in revisions)


def _checked_digest(repository: Repository, file: str) -> str:
    path = repository.folder / file
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    name = path.resolve().name
    if len(name) == len(digest) and name != digest:
        raise UserError(f"the cached copy of {file} of {repository.what} is damaged: remove {path.resolve()}")
    return digest


def _present_name(kind: Kind, name: str) -> str:
    """OWNER/NAME of a repository that once had no owner; the libraries no longer take the short names of data sets."""
    if is_offline(kind) or not hub_reached():
        return _moved(kind, name)
    from huggingface_hub import HfApi

    now: str = wait_if_told(lambda: HfApi().repo_info(name, repo_type=kind)).id
    if now != name:
        file = _moved_file(kind, name)
        with disk_errors_named(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps({"now": now}) + "\n", file.with_suffix(f".{os.getpid()}"))
    return now


def _moved(kind: Kind, name: str) -> str:
    """The name that a repository is known to have now."""
    try:
        now = read_json_object(_moved_file(kind, name)).get("now")
    except (FileNotFoundError, Unreadable):
        return name
    return now if isinstance(now, str) and is_hub_id(now) else name


def _moved_file(kind: Kind, name: str) -> Path:
    return cache_root() / "hub" / f"{_cached_repository(kind, name).name}.json"


def _find_commit(kind: Kind, name: str, revision: str | None, prefix: str) -> str:
    cached = _cached_commit(kind, name, revision)
    if revision is not None and cached == revision:
        return revision
    if is_offline(kind):
        if cached is None:
            raise UserError(
                f"{prefix}{named(kind, name, revision)} is not in the local cache and HF_HUB_OFFLINE is set: "
                f"unset it, or {OFFLINE_WAYS[kind]}"
            )
        return cached
    if not hub_reached():
        if cached is None:
            raise UserError(
                f"{prefix}{named(kind, name, revision)} is on the Hugging Face Hub, which is out of reach: "
                f"{OFFLINE_WAYS[kind]}, or fill the cache (HF_HOME) where it is in reach"
            )
        if is_first_process():
            out_of_reach = f"the Hugging Face Hub is out of reach: {name} is read from the cache, as of {cached[:8]}"
            print(f"note        {out_of_reach}", file=sys.stderr)
        go_offline()
        return cached
    from huggingface_hub import HfApi

    resolved: Any = wait_if_told(lambda: HfApi().resolve_revision(name, repo_type=kind, revision=revision))
    return resolved.resolved


def _cached_commit(kind: Kind, name: str, revision: str | None) -> str | None:
    repository = _cached_repository(kind, name)
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    return commit if commit and (repository / "snapshots" / commit).is_dir() else None


def _cached_repository(kind: Kind, name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)


def _place(kind: Kind, name: str, revision: str | None) -> tuple[str, ...]:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE), constants.ENDPOINT, kind, name, revision or ""


def _remembered(memo: Path, repository: Repository) -> dict[str, Any] | None:
    """What was chosen before, where all of its files are still in the Hub's cache."""
    try:
        found = read_json_object(memo)
        return found if all((repository.folder / file).is_file() for file in found["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget() -> None:
    """Begin as a new process does: nothing is opened, nothing read, no answer known."""
    _opened.clear()
    _read.clear()
    answered.clear()
