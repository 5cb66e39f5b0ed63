"""Executes the notebooks of examples/ against the stand-in of the Hub, and writes their outputs into them.

python -m tests.notebooks
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.hub_stand_in import repositories
from tests.hub_stand_in.client import settings
from tests.hub_stand_in.server import HubStandIn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
CELL_SECONDS = 600


def execute(notebook: Path, hub: HubStandIn, folder: Path) -> Any:
    """The notebook with the outputs of a kernel that runs in `folder` and whose Hub is `hub`."""
    content = nbformat.read(notebook, as_version=4)
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", **settings(hub, folder / "caches")}
    with variables(environment):
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(content, timeout=CELL_SECONDS, coalesce_streams=True, resources=place).execute()
    return content


def shortened(output: Any) -> Any:
    """An output without a whole page, which is as large as all others, and shows where it was made."""
    if "<iframe" in output.get("data", {}).get("text/html", ""):
        output.data["text/html"] = "<p>(the page of the runs, in a frame)</p>"
    return output


@contextmanager
def variables(given: Mapping[str, str]) -> Iterator[None]:
    """Within it the environment has these too."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    """Execute each, and replace its file."""
    hub = HubStandIn()
    repositories.stock(hub)
    for notebook in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            content = execute(notebook, hub, Path(folder))
        for cell in content.cells:
            cell.metadata.pop("execution", None)  # times, which change at each run
            if "outputs" in cell:
                cell.outputs = [shortened(own) for own in cell.outputs if "TqdmWarning" not in own.get("text", "")]
        nbformat.write(content, notebook)
        print(notebook)
    hub.shutdown()


if __name__ == "__main__":
    main()
