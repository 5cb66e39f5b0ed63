"""The files around the code: package metadata, containers, the workflow and the form for a bug say what is so."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tests.e2e.test_wheel import FILES, SOURCES

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_classifiers_begin_with_the_oldest_python_and_name_no_licence_twice():
    versions = [line.split(" :: ")[-1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert f">={versions[0]}" == PROJECT["requires-python"] and versions == sorted(versions)
    assert not any("License" in line for line in PROJECT["classifiers"]), "setuptools refuses it beside `license`"


def test_what_is_pinned_is_required_somewhere():
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    required = {re.split(r"[\[<>=; ]", line)[0].lower() for line in lines}
    pinned = [line.split("==")[0].lower() for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    # accelerate and its like bring these, and isotune's results depend on them
    assert {name for name in pinned if name and not name.startswith("#")} - required <= {"mkdocstrings-python"}


def test_the_workflow_runs_what_must_pass_before_a_merge():
    (file,) = (REPOSITORY / ".github/workflows").iterdir()
    workflow = yaml.safe_load(file.read_text())
    job = workflow["jobs"]["run"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert (REPOSITORY / ".ci/run").stat().st_mode & 0o111
    assert PROJECT["requires-python"].removeprefix(">=") in job["strategy"]["matrix"]["python"]


def test_the_form_for_a_bug_asks_for_the_doctors_json():
    form = yaml.safe_load((REPOSITORY / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    by_id = {field["id"]: field for field in form["body"]}
    assert by_id["doctor"]["attributes"]["label"] == "isotune doctor --json"
    assert by_id["doctor"]["validations"]["required"]


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, "containers/Dockerfile"], cwd=REPOSITORY, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_containers_copy_what_a_wheel_is_built_from():
    dockerfile = (REPOSITORY / "containers/Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in re.findall(r"^COPY (?!--from).*", dockerfile, re.MULTILINE)]
    assert {name for names in copied for name in names} == {*SOURCES, *FILES}
    definition = (REPOSITORY / "containers/isotune.def").read_text()
    files = re.search(r"^%files\n((?:    .*\n)+)", definition, re.MULTILINE)
    assert files is not None
    pairs = [line.split() for line in files[1].splitlines()]
    assert {source for source, _ in pairs} == {*SOURCES, *FILES}
    assert all(target == f"/source/{source}" for source, target in pairs)


def test_the_containers_install_extras_that_there_are():
    text = (REPOSITORY / "containers/Dockerfile").read_text() + (REPOSITORY / "containers/isotune.def").read_text()
    named = set(re.findall(r"EXTRAS=(\w+)|extras=(\w+)", text))
    assert {name for pair in named for name in pair if name} <= set(PROJECT["optional-dependencies"])


def test_the_batch_files_run_the_image_that_the_definition_builds():
    environment = (REPOSITORY / "slurm/environment.sh").read_text()
    assert "ISOTUNE_CONTAINER" in environment and "apptainer exec" in environment
    definition = (REPOSITORY / "containers/isotune.def").read_text()
    assert re.search(r"ISOTUNE_CONTAINER=\S*isotune\.sif sbatch (slurm/\w+\.sbatch)", definition)
    assert [
        section for section in ("%arguments", "%files", "%post", "%runscript", "%test") if section not in definition
    ] == []
