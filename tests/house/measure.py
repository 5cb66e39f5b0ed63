"""Prints the figures of docs/house.md: how large the code is, and how many files a reader passes through.

python tests/house/measure.py                              the static figures of this checkout
python tests/house/measure.py --trace                      the traced ones too: trains and evaluates tiny models
python tests/house/measure.py --trace --write docs/house.md --column after
python tests/house/measure.py --src OTHER/src              another checkout, also an older one

The traced figures need the packages of the measured checkout: run this file with the Python of its .venv.
"""

import argparse
import ast
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "isotune"
TRAINERS = ("Trainer", "SFTTrainer")  # of transformers and of trl
PUBLIC_UNDERSCORES = {"_exit", "_replace", "_asdict", "_fields", "_make", "_field_defaults"}  # of os and namedtuple
SFT_RECIPE = """
model_name_or_path: builtin:opt-tiny
model_init: random
tune: full
dataset_name: builtin:pirate
max_seq_length: 128
global_batch_size: 4
max_steps: 1
save_strategy: no
sample_prompt: ""
disable_tqdm: true
"""
CLASSIFIER_RECIPE = """
model_name_or_path: builtin:bert-tiny
tune: full
dataset_name: builtin:opinions
eval_dataset_name: builtin:opinions
max_seq_length: 64
max_steps: 1
save_strategy: no
disable_tqdm: true
"""


def module_files(src: Path) -> list[Path]:
    """Every Python file below `src`."""
    return sorted(src.rglob("*.py"))


def count_lines(files: Iterable[Path]) -> int:
    """Lines of all files, comments and blank lines included."""
    return sum(len(file.read_text().splitlines()) for file in files)


def largest_folder(files: Iterable[Path]) -> tuple[str, int]:
    """The folder that holds the most modules, `__init__.py` not counted, and how many."""
    folders = Counter(file.parent for file in files if file.name != "__init__.py")
    folder, modules = folders.most_common(1)[0]
    return folder.name, modules


def class_methods(tree: ast.AST) -> dict[str, tuple[list[str], set[str]]]:
    """Class -> (last names of its bases, names of its methods), of one module."""
    return {
        node.name: (
            [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases],
            {part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)},
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def library_methods() -> set[str]:
    """Names of the methods of transformers.Trainer and trl.SFTTrainer, as installed; read, not imported."""
    names: set[str] = set()
    for package, file in (
        ("transformers", "trainer.py"),
        ("trl", "trainer/sft_trainer.py"),
        ("trl", "trainer/base_trainer.py"),
    ):
        spec = importlib.util.find_spec(package)
        path = Path(spec.submodule_search_locations[0]) / file if spec and spec.submodule_search_locations else None
        if path is not None and path.is_file():
            for name, (_, methods) in class_methods(ast.parse(path.read_text())).items():
                names |= methods if name.endswith("Trainer") else set()
    return names


def overridden_methods(trees: Iterable[ast.AST], library: set[str]) -> set[str]:
    """Methods of `library` that our trainer classes define too.

    Trainer classes are those that inherit from Trainer or SFTTrainer, and those that such a class inherits from.
    """
    classes: dict[str, tuple[list[str], set[str]]] = {}
    for tree in trees:
        classes |= class_methods(tree)
    trainers = {name for name in classes if set(TRAINERS) & set(_ancestors(name, classes))}
    trainers |= {base for name in trainers for base in _ancestors(name, classes) if base in classes}
    return {method for name in trainers for method in classes[name][1] & library}


def _ancestors(name: str, classes: dict[str, tuple[list[str], set[str]]]) -> list[str]:
    """Every class above `name`; one that has the name of its own base, such as Trainer(Trainer), is no loop."""
    found: list[str] = []
    waiting = list(classes.get(name, ([], set()))[0])
    while waiting:
        base = waiting.pop()
        if base not in found:
            found.append(base)
            waiting += classes.get(base, ([], set()))[0] if base != name else []
    return found


def private_uses(trees: dict[Path, ast.AST]) -> list[str]:
    """`file: name` for each use outside compat/ of a private name that no module, class or `self` of `trees` defines.

    Such a name belongs to a library, or was put onto an object of a library.
    """
    own = {name for tree in trees.values() for name in _defined(tree)} | PUBLIC_UNDERSCORES
    return [
        f"{path}: {name}"
        for path, tree in trees.items()
        for name in _private_names(tree)
        if name not in own and "compat" not in path.parts
    ]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            yield from (name for name in [*parts, *(alias.name for alias in node.names)] if _is_private(name))
        elif isinstance(node, ast.Import):
            yield from (name for alias in node.names for name in alias.name.split(".") if _is_private(name))


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "ctx")


def count_type_ignores(text: str) -> int:
    """Comments of the form `# type: ignore`."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and "type: ignore" in token.string for token in tokens)


def count_any(tree: ast.AST) -> int:
    """Uses of typing.Any; its imports are not counted."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def static_figures(src: Path) -> dict[str, str]:
    """Row of the table -> value, from the text of the files below `src`."""
    files = module_files(src)
    texts = {file.relative_to(src): file.read_text() for file in files}
    trees: dict[Path, ast.AST] = {path: ast.parse(text) for path, text in texts.items()}
    overridden = overridden_methods(trees.values(), library_methods())
    private = sum(name.startswith("_") and not name.startswith("__") for name in overridden)
    folder, modules = largest_folder(files)
    return {
        "lines of src/": f"{count_lines(files):,}",
        "Python files of src/": str(len(files)),
        "modules of the largest folder": f"{modules} (`{folder}/`)",
        "overridden methods of Trainer and SFTTrainer": str(len(overridden)),
        "of these, private": str(private),
        "private members of library objects used outside `compat/`": str(len(private_uses(trees))),
        "`type: ignore`": str(sum(map(count_type_ignores, texts.values()))),
        "uses of `Any`": str(sum(map(count_any, trees.values()))),
    }


class FileTrace:
    """The files of the package that run a function while this is the profile function of the thread.

    Functions that run while a module is imported are not counted.

    Attributes:
        files: below the package's folder.
    """

    def __init__(self, package: Path) -> None:
        self.files: set[str] = set()
        self._package = str(package) + os.sep

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self.is_own(frame) and self.is_in_scope(frame):
            self.files.add(frame.f_code.co_filename.removeprefix(self._package))

    def is_own(self, frame: FrameType) -> bool:
        """Whether the frame runs code of the package."""
        return frame.f_code.co_filename.startswith(self._package)

    def is_in_scope(self, frame: FrameType) -> bool:
        """Whether no module of the package is being imported around the frame."""
        return not any(self.is_own(outer) and outer.f_code.co_name == "<module>" for outer in stack(frame))


class GradientTrace(FileTrace):
    """From a document to its gradient: what runs below isotune.data, and the update's own work in Trainer's loop."""

    def is_in_scope(self, frame: FrameType) -> bool:
        """Whether the frame prepares data, or belongs to an update; callbacks, logging and saving do not."""
        if not super().is_in_scope(frame):
            return False
        codes = [outer.f_code for outer in stack(frame)]
        if any(code.co_filename.startswith(os.path.join(self._package, "data") + os.sep) for code in codes):
            return True
        names = {code.co_name for code in codes}
        return "_run_epoch" in names and not names & {"call_event", "_maybe_log_save_evaluate"}


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and everything that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def trace_gradient(root: Path, folder: Path) -> dict[str, set[str]]:
    """Files that prepare the data, and those of the first update up to the optimizer's step."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    trace = GradientTrace(root / "src" / PACKAGE)
    register_optimizer_step_pre_hook(lambda *_: sys.setprofile(None))
    recipe = folder / "sft.yaml"
    recipe.write_text(SFT_RECIPE)
    run_script(root / "train/sft_opt.py", f"--config {recipe} --output_dir {folder}/sft", trace)
    return {"files from a document to its gradient": trace.files}


def trace_metrics(root: Path, folder: Path) -> dict[str, set[str]]:
    """Files of eval/classify.py until metrics.json is in its place: from the first prediction on, and all of them."""
    from torch.nn.modules.module import register_module_forward_hook

    trace = FileTrace(root / "src" / PACKAGE)
    before: set[str] = set()
    written: list[str] = []
    recipe, run = folder / "classifier.yaml", folder / "classifier"
    recipe.write_text(CLASSIFIER_RECIPE)
    run_script(root / "train/yelp.py", f"--config {recipe} --output_dir {run}")

    def begin(*_: Any) -> None:
        if not before:
            before.update(trace.files)
            trace.files.clear()

    def end(event: str, arguments: tuple) -> None:
        if (event == "open" and opens_to_write(arguments, "metrics.json")) or (
            event == "os.rename" and str(arguments[1]).endswith("metrics.json")
        ):
            written.append(event)
            sys.setprofile(None)

    register_module_forward_hook(begin)
    sys.addaudithook(end)
    run_script(root / "eval/classify.py", f"--run_dir {run} --resamples 50 --no_pictures", trace)
    if not before or not written:
        raise RuntimeError("eval/classify.py predicted nothing, or wrote no metrics.json")
    return {
        "files from predictions to metrics.json": trace.files,
        "files of `eval/classify.py` up to metrics.json": trace.files | before,
    }


def opens_to_write(arguments: tuple, name: str) -> bool:
    """Whether the arguments of an `open` audit event are those of writing a file of this name."""
    path, mode, _ = arguments
    return str(path).endswith(name) and mode is not None and bool(set(mode) & set("wxa+"))


def run_script(script: Path, arguments: str, trace: FileTrace | None = None) -> None:
    """Run a script in this process, with `trace` as its profile function; its output goes to stderr."""
    sys.argv = [str(script), *arguments.split()]
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        sys.setprofile(trace)
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{script} {arguments} ended with status {end.code}") from end
    finally:
        sys.setprofile(None)
        sys.stdout = output


def traced_files(src: Path) -> dict[str, list[str]]:
    """Row of the table -> files below the package's folder; each tiny run is a process of its own."""
    rows: dict[str, list[str]] = {}
    for name in TRACES:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "ISOTUNE_CACHE": f"{folder}/cache",  # so that the data is prepared, not read
                "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"),  # no restart
                "PYTHONDONTWRITEBYTECODE": "1",
                "HF_HUB_OFFLINE": "1",
            }
            command = [sys.executable, __file__, "--src", str(src), "--trace_child", name, folder]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False, cwd=folder)
        if done.returncode:
            raise SystemExit(f"the traced run {name} ended with status {done.returncode}")
        rows |= json.loads(done.stdout.splitlines()[-1])
    return rows


TRACES = {"gradient": trace_gradient, "metrics": trace_metrics}


def as_table(figures: dict[str, str], column: str) -> str:
    """A Markdown table of one column of figures."""
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    return "\n".join([f"| | {column} |", "|---|---|", *rows])


def fill_column(page: str, figures: dict[str, str], column: str) -> str:
    """The page with `figures` in the named column of the table whose header has it; other rows stay."""
    lines = page.split("\n")
    header = next(i for i, line in enumerate(lines) if re.search(rf"^\|.*\| {re.escape(column)} \|", line))
    place = [cell.strip() for cell in lines[header].split("|")].index(column)
    for i in range(header + 2, len(lines)):
        cells = lines[i].split("|")
        if len(cells) <= place:
            break
        if cells[1].strip() in figures:
            cells[place] = f" {figures[cells[1].strip()]} "
            lines[i] = "|".join(cells)
    return "\n".join(lines)


def main() -> None:
    """Print the table, or fill in one column of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="the folder that holds the package")
    parser.add_argument("--trace", action="store_true", help="run tiny models, and count the files they pass through")
    parser.add_argument("--list", action="store_true", help="name private members of libraries and traced files")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="fill the column of this page's table")
    parser.add_argument("--column", default="after", help="its header (%(default)s)")
    parser.add_argument("--trace_child", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    src = given.src.resolve()
    if given.trace_child:
        name, folder = given.trace_child
        rows = TRACES[name](src.parent, Path(folder))
        print(json.dumps({row: sorted(files) for row, files in rows.items()}))
        return
    figures = static_figures(src)
    traced = traced_files(src) if given.trace else {}
    figures |= {row: str(len(files)) for row, files in traced.items()}
    if given.write:
        given.write.write_text(fill_column(given.write.read_text(), figures, given.column))
    print(as_table(figures, given.column))
    if given.list:
        trees: dict[Path, ast.AST] = {file.relative_to(src): ast.parse(file.read_text()) for file in module_files(src)}
        print("\nprivate members of libraries:", *private_uses(trees), sep="\n  ")
        print("\noverridden methods:", *sorted(overridden_methods(trees.values(), library_methods())), sep="\n  ")
        for row, passed in traced.items():
            print(f"\n{row}:", *passed, sep="\n  ")


if __name__ == "__main__":
    main()
