"""`make mutants`: changes one operator or number of the code at a time and reports the changes that no test notices.

    python -m tests.mutants [--all] [--sample N] [--base REF] [FILE ...]

[tool.mutants] of pyproject.toml names the modules with the tests that must notice. By default only lines that differ
from the common ancestor with `--base` (origin/main, or main where there is no remote) are changed; `--all` changes
every line. `--sample N` tests N of each module's mutants, always the same ones: all of them take hours. The mutants
are cosmic-ray's. Each is tested in a fork of this process, which has imported the libraries, and in memory alone: no
file is touched. A mutant that computes the same as the code is listed in docs/mutants.md with the reason, and is not
reported; nor is one that takes `frozen`, `strict` or the `*` before named parameters away. The exit status is 1 where a
mutant survives.
"""

import argparse
import difflib
import importlib.abc
import importlib.machinery
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

REPOSITORY = Path(__file__).resolve().parents[1]
EQUIVALENT = REPOSITORY / "docs" / "mutants.md"
# guards against a bug of whoever calls: where there is none, the code computes the same without them
GUARD = re.compile(r"\b(frozen|strict)= ?(True|False)\b|(?<![\w)\]] )[*/](?=,)")
LIBRARIES = ("numpy", "torch", "scipy.stats", "safetensors.torch", "transformers", "pytest", "hypothesis")
# replacements that fail in any test that runs the line, and two that change nothing by design
LEFT_OUT = re.compile(r"NoOp|Insert|VariableReplacer|ReplaceBinaryOperator_.*_(Pow|LShift|RShift|BitOr|BitAnd|BitXor)$")
TIMEOUT_FACTOR, SHORTEST_TIMEOUT_SECONDS = 5, 60


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        file: within the repository.
        line: of the change, from 1.
        before, after: the changed lines, stripped, joined where they are several.
        source: the whole module with the change.
    """

    file: str
    line: int
    before: str
    after: str
    source: str

    def entries(self) -> set[tuple[str, str, str]]:
        """What docs/mutants.md would list it as."""
        return {(self.file, self.before, self.after), (self.file, self.before, "any")}

    def __str__(self) -> str:
        return f"{self.file}:{self.line}\n  - {self.before}\n  + {self.after}"


def mutants_of(file: str, lines: set[int] | None) -> Iterator[Mutant]:
    """Every distinct change of a module that begins on one of `lines`; None for all of them."""
    source = (REPOSITORY / file).read_text()
    if lines is not None and not lines:
        return
    nodes = list(ast_nodes(get_ast(source)))
    seen = set()
    for name in operator_names():
        if LEFT_OUT.search(name):
            continue
        operator = get_operator(name)
        if operator.arguments():
            continue
        places = [begin for node in nodes for begin, _ in operator().mutation_positions(node)]
        for occurrence, (line, _) in enumerate(places):
            mutated = mutate_code(source, operator(), occurrence) if lines is None or line in lines else None
            if mutated is not None and mutated not in seen and GUARD.sub("", mutated) != GUARD.sub("", source):
                seen.add(mutated)
                yield Mutant(file, line, *changed_lines(source, mutated), mutated)


def changed_lines(source: str, mutated: str) -> tuple[str, str]:
    """What was there and what is there now."""
    changes = list(difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=0, lineterm=""))[2:]
    return tuple(" / ".join(line[1:].strip() for line in changes if line[0] == sign) for sign in "-+")


def lines_changed_since(base: str, file: str) -> set[int]:
    """Numbers of the lines of `file` that differ from the common ancestor with `base`."""
    ancestor = git("merge-base", base, "HEAD").strip()
    lines: set[int] = set()
    for begin, count in re.findall(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", git("diff", "-U0", ancestor, "--", file), re.M):
        lines |= set(range(int(begin), int(begin) + int(count or 1)))
    return lines


def git(*words: str) -> str:
    """What git prints; ends the program where git fails."""
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def default_base() -> str:
    """origin/main, or main where there is no remote."""
    return next(
        (name for name in ("origin/main", "main") if name in git("branch", "-a", "--format=%(refname:short)")), "HEAD"
    )


def equivalent() -> set[tuple[str, str, str]]:
    """File, line before and line after ("any": every change) of the mutants that docs/mutants.md lists."""
    listed, file = set(), ""
    for line in EQUIVALENT.read_text().splitlines():
        if heading := re.fullmatch(r"## (src/\S+)", line):
            file = heading[1]
        elif entry := re.match(r"- `(.+?)` → (?:`(.+?)`|any): \S", line):
            listed.add((file, entry[1], entry[2] or "any"))
    return listed


class MutatedModule(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a text instead of its file."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.file.removeprefix("src/").removesuffix(".py").replace("/", ".")
        self.path, self.source = str(REPOSITORY / mutant.file), mutant.source

    def find_spec(self, fullname, path, target=None):
        """The module's own, for its name alone."""
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.path)

    def get_filename(self, fullname: str) -> str:
        """Where tracebacks look for the text."""
        return self.path

    def get_data(self, path: str | bytes) -> bytes:
        """The text."""
        return self.source.encode()


def start_tests(tests: Sequence[str], mutant: Mutant | None) -> int:
    """Run the tests in a fork, which exits with pytest's status; returns its process id."""
    if process := os.fork():
        return process
    os.setsid()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    if mutant is not None:
        changed = MutatedModule(mutant)
        sys.meta_path.insert(0, changed)
        try:
            importlib.import_module(changed.name)  # before pytest, which reads modules named *_test.py by itself
        except BaseException:
            os._exit(1)
    from hypothesis import HealthCheck, Phase, settings

    phases = (Phase.explicit, Phase.generate)  # what fails need not be made small
    settings.register_profile(
        "mutants", derandomize=True, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("mutants")
    import pytest

    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", *tests]))


def passes(process: int, timeout_seconds: float) -> bool:
    """Whether the tests of this process pass within the time."""
    watched = os.pidfd_open(process)
    ended = select.select([watched], [], [], timeout_seconds)[0]
    os.close(watched)
    if not ended:
        os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def survivors(mutants: Sequence[Mutant], tests: Sequence[str]) -> Iterator[Mutant]:
    """The mutants with which all `tests` pass.

    Raises:
        SystemExit: the tests fail without a mutant.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    started = time.monotonic()
    if not passes(start_tests(tests, None), 3600):
        sys.exit(f"error: {' '.join(tests)} fail without any change")
    timeout_seconds = max(SHORTEST_TIMEOUT_SECONDS, TIMEOUT_FACTOR * (time.monotonic() - started))
    running: list[tuple[Mutant, int]] = []
    for mutant in [*mutants, *[None] * (os.cpu_count() or 1)]:
        if len(running) == (os.cpu_count() or 1) or (mutant is None and running):
            oldest, process = running.pop(0)
            if passes(process, timeout_seconds):
                yield oldest
        if mutant is not None:
            running.append((mutant, start_tests(tests, mutant)))


def main() -> int:
    """Test the mutants that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every line, not only changed ones")
    parser.add_argument("--sample", type=int, help="test so many mutants of each module, drawn by a fixed seed")
    parser.add_argument("--base", default=None, help="the branch to compare with; default origin/main, else main")
    parser.add_argument("files", nargs="*", help="modules of [tool.mutants]; default all of them")
    asked = parser.parse_args()
    tests_of = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mutants"]
    if unknown := set(asked.files) - set(tests_of):
        parser.error(f"{', '.join(sorted(unknown))}: not in [tool.mutants] of pyproject.toml")
    base = asked.base or default_base()
    known, tested, left = equivalent(), 0, []
    for file in asked.files or tests_of:
        lines = None if asked.all else lines_changed_since(base, file)
        mutants = [m for m in mutants_of(file, lines) if known.isdisjoint(m.entries())]
        if asked.sample is not None and asked.sample < len(mutants):
            mutants = random.Random(0).sample(mutants, asked.sample)
        tested += len(mutants)
        survived = []
        for mutant in survivors(mutants, tests_of[file]) if mutants else ():
            survived.append(mutant)
            print(f"survived  {mutant}", flush=True)
        if mutants:
            print(f"{file}: {len(mutants) - len(survived)} of {len(mutants)} noticed", flush=True)
        left += survived
    print(f"{tested - len(left)} of {tested} mutants were noticed, {len(left)} survived")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
