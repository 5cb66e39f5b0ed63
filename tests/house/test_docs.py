"""The documentation names fields, symbols, paths and pages that exist."""

import dataclasses
import importlib
import inspect
import json
import re
import warnings
from pathlib import Path

import pytest
import yaml
from tests.drop_in_table import fields_table
from transformers import Trainer as LibraryTrainer
from trl import SFTTrainer as TrlTrainer

from isotune.config import ClassificationRecipe, Recipe
from isotune.drop_in.fields import FIELDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
KNOWN_FIELDS = ROOT / "tests/fixtures/known_fields.json"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *sorted(DOCS.glob("*.md"))]
# A path of the repository, in backticks. Paths with a placeholder or of a run are not of the repository.
PATH = re.compile(r"`((?:src|tests|train|eval|slurm|docs|benchmarks|accelerate_configs|ds_configs)/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
FIELD = re.compile(r"^\| `(\w+)` \| (TrainingArguments|SFTConfig) \| (same|no|`\w+`) \| (.*) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def documented() -> dict[str, tuple[str, str, str]]:
    """Field -> (library class, what it is called here, note), from docs/coming-from-trl.md."""
    page = (DOCS / "coming-from-trl.md").read_text()
    rows = FIELD.findall(page)
    assert len(rows) == page.count("\n| `") > 100, "a row is not of the form | `field` | class | here | note |"
    assert len(rows) == len({name for name, *_ in rows}), "a field stands twice"
    return {name: (owner, here, note) for name, owner, here, note in rows}


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """Field -> the class of the installed libraries that defines it."""
    from transformers import TrainingArguments
    from trl import SFTConfig

    fields = {field.name: "SFTConfig" for field in dataclasses.fields(SFTConfig)}
    return fields | {field.name: "TrainingArguments" for field in dataclasses.fields(TrainingArguments)}


def test_every_documented_field_is_one_of_the_installed_libraries(documented, installed):
    assert {name: owner for name, (owner, *_) in documented.items() if installed.get(name) != owner} == {}
    missing = sorted(set(installed) - set(documented))
    if missing:  # an upstream release that adds a field does not break the build
        warnings.warn(f"docs/coming-from-trl.md lacks the new fields {', '.join(missing)}", stacklevel=1)


def test_the_page_agrees_with_the_recipe_about_every_field(documented):
    keys = set(Recipe.keys()) | set(ClassificationRecipe.keys())
    for name, (_, here, note) in documented.items():
        if here == "same":
            assert name in keys, f"{name} is not a key"
        elif here == "no":
            assert name not in keys, f"{name} is a key"
            assert note, f"{name}: the page does not say why"
        else:
            assert here.strip("`") in keys, f"{name}: {here} is not a key"
            assert name not in keys, f"{name} is a key itself"


def test_the_recipe_beside_the_trl_configuration_is_a_recipe():
    page = (DOCS / "coming-from-trl.md").read_text()
    block = page[page.index("    task: sft") : page.index("Keys of LoraConfig")]
    recipe = Recipe.from_values(**yaml.safe_load(block))
    assert (recipe.global_batch_size, recipe.max_seq_length, recipe.tune) == (16, 1024, "lora")


def test_every_symbol_of_the_api_page_can_be_imported_and_has_a_docstring():
    symbols = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert symbols
    for symbol in symbols:
        module, _, name = symbol.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, symbol


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_link_of_a_page_exists(page):
    text = page.read_text()
    paths = [ROOT / path for path in PATH.findall(text)]
    links = [page.parent / link for link in LINK.findall(text)]
    assert [str(path.relative_to(ROOT)) for path in paths + links if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_symbol_that_is_placed_in_a_module_stands_there(page):
    placed = re.findall(r"`(\w+)`(?: of [\w' ]+)?\s+in\s+`(src/[\w/]+\.py)`", page.read_text())
    assert [(name, file) for name, file in placed if not re.search(rf"\b{name}\b", (ROOT / file).read_text())] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_section_that_train_otherwise_write_to_other_folders(page):
    """One folder holds one run: the second command would be refused."""
    for section in page.read_text().replace("\\\n", " ").split("\n## "):
        runs: dict[str, str] = {}
        for script, words in re.findall(r"^    (?!\$).*(train/\w+\.py)\b([^#\n]*)", section, re.MULTILINE):
            flags = dict(re.findall(r"--(\w+) ([^-].*?)(?= --|\s*$)", words))
            default = re.search(r'"(\w+\.yaml)"', (ROOT / script).read_text())
            assert default is not None
            config = flags.pop("config", f"train/configs/{default.group(1)}")
            folder = flags.pop("output_dir", None) or yaml.safe_load((ROOT / config).read_text())["output_dir"]
            flags.pop("resume", None)
            result = f"{config} {sorted(flags.items())}"
            assert runs.setdefault(folder, result) == result, folder


def test_evaluations_of_yelp_are_of_the_folder_that_its_recipe_writes():
    folder = yaml.safe_load((ROOT / "train/configs/yelp_bert.yaml").read_text())["output_dir"]
    for file in [*PAGES, *ROOT.glob("eval/*.py"), *ROOT.glob("eval/configs/*.yaml"), ROOT / "src/isotune/cli.py"]:
        assert {*re.findall(r"\bruns/yelp(?:_bert)?(?=[/\s`])", file.read_text())} <= {folder}, file


def test_exact_matches_of_the_demo_are_those_that_the_readme_prints():
    share = re.search(r"exact_match +0 +([\d.]+)", (ROOT / "README.md").read_text())
    assert share is not None
    right = round(float(share.group(1)) * 32)
    assert f"exact match {right} of 32" in (ROOT / "eval/configs/pirate.yaml").read_text()
    assert f"0 before, {right} after" in (ROOT / "train/configs/demo.yaml").read_text()


def test_the_readme_fits_on_three_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_drift_in_the_readme_is_that_of_the_benchmarks():
    readme, benchmarks = (ROOT / "README.md").read_text(), (DOCS / "benchmarks.md").read_text()
    short = readme[readme.index("| on 2 processes") :].split("\n\n")[0].splitlines()[2:]
    whole = benchmarks[benchmarks.index("| 2 processes") : benchmarks.index("| 3 processes")]
    figures = [row.split("|", 2)[2].strip(" |") for row in short]
    assert len(figures) == 4
    assert [figure for figure in figures if f"| {figure} |" not in whole] == []


def test_the_site_lists_every_page_once():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_page_of_ones_own_script_has_every_argument_of_both_constructors():
    rows = re.findall(r"^\| `(\w+)` \| (both|Trainer|SFTTrainer) \|", (DOCS / "drop-in.md").read_text(), re.M)
    names = {kind: set(inspect.signature(kind.__init__).parameters) - {"self"} for kind in (LibraryTrainer, TrlTrainer)}
    of_both = names[LibraryTrainer] & names[TrlTrainer]
    assert {name for name, of in rows if of == "both"} == of_both
    assert {name for name, of in rows if of == "Trainer"} == names[LibraryTrainer] - of_both
    assert {name for name, of in rows if of == "SFTTrainer"} == names[TrlTrainer] - of_both


def test_the_page_of_ones_own_script_has_a_verdict_for_every_field_of_the_libraries(installed):
    page = (DOCS / "drop-in.md").read_text()
    assert f"-->\n{fields_table()}<!-- end -->" in page, "python -m tests.drop_in_table writes it"
    assert FIELDS.keys() <= installed.keys(), "a verdict on a field that no library has"
    known = {name for names in json.loads(KNOWN_FIELDS.read_text()).values() for name in names}
    assert known & installed.keys() <= FIELDS.keys()
    missing = sorted(installed.keys() - FIELDS.keys())
    if missing:  # an upstream release that adds a field does not break the build
        warnings.warn(f"src/isotune/drop_in/fields.py lacks the new fields {', '.join(missing)}", stacklevel=1)
