"""The figures of docs/house.md are counted right, on small packages whose figures are known."""

import ast
import importlib
import sys
import textwrap
from pathlib import Path

import pytest
from tests.house import measure


def parse(text: str) -> ast.AST:
    return ast.parse(textwrap.dedent(text))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A package of two rooms: two modules and an `__init__.py` each in one, one module in the other."""
    package = tmp_path / "src" / "isotune"
    files = {
        "__init__.py": '"""The package."""\n',
        "data/__init__.py": "",
        "data/read.py": "from typing import Any\n\n\ndef read(x: Any) -> Any:\n    return x  # type: ignore\n",
        "data/write.py": "import os\n\n\ndef write(x):\n    os._exit(0)\n",
        "models/loss.py": "def loss(model):\n    return model._private_of_a_library\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return tmp_path / "src"


def test_static_figures_of_a_small_package(src):
    figures = measure.static_figures(src)
    assert figures["lines of src/"] == "13"
    assert figures["Python files of src/"] == "5"
    assert figures["modules of the largest folder"] == "2 (`data/`)"
    assert figures["private members of library objects used outside `compat/`"] == "1"
    assert figures["`type: ignore`"] == "1"
    assert figures["uses of `Any`"] == "2"
    assert figures["overridden methods of Trainer and SFTTrainer"] == "0"


def test_overrides_of_the_whole_column_of_trainers_and_of_a_mixin_are_counted_once():
    ours = parse("""
        class Planned:
            def training_step(self): ...
            def _clip(self): ...
            def ours(self): ...
        class Base(transformers.Trainer):
            def training_step(self): ...
        class Trainer(Planned, Base):
            def train(self): ...
        class Bystander:
            def evaluate(self): ...
    """)
    library = {"train", "training_step", "_clip", "evaluate"}
    assert measure.overridden_methods([ours], library) == {"train", "training_step", "_clip"}


def test_the_installed_trainers_have_the_methods_that_a_subclass_overrides():
    assert {"training_step", "get_train_dataloader", "_run_epoch", "compute_loss"} <= measure.library_methods()


def test_private_names_of_libraries_are_told_from_our_own():
    trees = {
        Path("isotune/models/a.py"): parse("""
            from torch._dynamo import something
            import peft.utils._hidden
            class A:
                def __init__(self, model):
                    self._own = model._theirs
                    self._own.__dict__
                def _method(self):
                    return self._method, self._own, _, model.config._theirs
            def f(pair):
                return pair._replace(x=1)
        """),
        Path("isotune/compat/torch.py"): parse("torch._C._private()"),
    }
    assert sorted(use.split(": ")[1] for use in measure.private_uses(trees)) == [
        "_dynamo",
        "_hidden",
        "_theirs",
        "_theirs",
    ]


def test_type_ignores_are_comments_and_not_text():
    assert measure.count_type_ignores('x = 1  # type: ignore\ny = "# type: ignore"\nz = 2  # type: ignore[attr]\n') == 2


def test_only_files_that_run_a_function_are_traced_and_imports_are_not(tmp_path, monkeypatch):
    package = tmp_path / "traced_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def run():\n    from traced_package import b\n    return b.VALUE\n")
    (package / "b.py").write_text("def make():\n    return 1\n\n\nVALUE = make()\n")
    (package / "c.py").write_text("def never():\n    return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    trace = measure.FileTrace(package)
    a, _ = (importlib.import_module(f"traced_package.{name}") for name in ("a", "c"))

    sys.setprofile(trace)
    try:
        assert a.run() == 1
    finally:
        sys.setprofile(None)
    assert trace.files == {"a.py"}


def test_a_column_of_a_page_is_filled_and_everything_else_stays():
    page = "text\n\n| figure | before | after |\n|---|---|---|\n| lines | 3 | |\n| other | 4 | 5 |\n\n| lines | x | |\n"
    filled = measure.fill_column(page, {"lines": "2"}, "after")
    assert filled == page.replace("| lines | 3 | |", "| lines | 3 | 2 |")
    assert measure.fill_column(filled, {"lines": "9"}, "before") == filled.replace("| 3 |", "| 9 |")
