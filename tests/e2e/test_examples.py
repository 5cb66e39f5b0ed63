"""The notebooks of examples/ run to their end, in a real kernel, against a stand-in of the Hub."""

from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="nbclient executes the notebooks")

from tests.hub_stand_in.server import HubStandIn
from tests.notebooks import NOTEBOOKS, execute


def test_there_are_notebooks():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["guanaco_opt350m", "yelp_bert"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_to_its_end_and_shows_pages_and_tables(notebook: Path, hub: HubStandIn, tmp_path: Path):
    cells = [cell for cell in execute(notebook, hub, tmp_path).cells if cell.cell_type == "code"]
    shown = ["".join(str(output.get("data", "")) for output in cell.outputs) for cell in cells]
    assert "data:image/png;base64," in shown[2], "the run shows its curve"
    assert any("95% interval" in one for one in shown) and "<iframe srcdoc=" in shown[-1]
    if notebook.stem == "guanaco_opt350m":
        assert shown[3] == "{'text/plain': 'True'}", "two processes have the bits of one"
