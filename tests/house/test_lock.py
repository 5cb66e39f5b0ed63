"""requirements.lock has what `make install` installs, each at one version and by the hashes of its files."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRY = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; (?P<marker>.+?))? \\\n(?P<hashes>(?: +--hash=\S+(?: \\)?\n)+)", re.M
)
WITHOUT = {"torch", "isotune"}  # each machine has its own build of torch


@pytest.fixture(scope="module")
def locked() -> dict[str, list[re.Match[str]]]:
    """The entries of a name: several where versions of Python or systems differ."""
    text, found = (REPOSITORY / "requirements.lock").read_text(), {}
    assert ENTRY.sub("", text) == "", "nothing but packages with hashes"
    for entry in ENTRY.finditer(text):
        found.setdefault(canonicalize_name(entry["name"]), []).append(entry)
    return found


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for here, with these extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    for extra in extras:
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            found += [str(r) for r in requirements(*requirement.extras)] if requirement.name == "isotune" else [text]
    return [
        requirement for text in found if not (requirement := Requirement(text)).marker or requirement.marker.evaluate()
    ]


def test_every_file_is_known_by_its_sha256(locked):
    for entries in locked.values():
        for entry in entries:
            hashes = re.findall(r"--hash=(\S+)", entry["hashes"])
            assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes), entry["name"]
            assert entry["marker"] is None or Marker(entry["marker"])


def test_what_the_project_asks_for_is_locked_within_its_ranges(locked):
    asked = requirements("all", "dev")
    assert len(asked) > 40
    for requirement in asked:
        if requirement.name not in WITHOUT:
            versions = [entry["version"] for entry in locked[canonicalize_name(requirement.name)]]
            assert all(requirement.specifier.contains(Version(version)) for version in versions), requirement


def test_the_lock_and_the_constraints_name_one_version(locked):
    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
    common = {name for name in pinned if canonicalize_name(name) in locked}
    assert len(common) > 40
    for name in common:
        assert [entry["version"] for entry in locked[canonicalize_name(name)]] == [pinned[name]]
    assert not WITHOUT & locked.keys()
