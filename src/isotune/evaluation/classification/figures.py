"""Figures of an evaluation: a plot with its alternative text beside it, on matplotlib's Agg canvas without pyplot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.io.files import replace_file, replacing

# Okabe and Ito's (2008), distinct with any common colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS_PER_INCH = 130


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure, its size in inches, with a grid of panels; `options` are of `Figure.subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def save_plot(figure: Any, file: Path, lines: Sequence[str]) -> None:
    """Write a plot and its alternative text, both atomically."""
    with replacing(file) as staging:
        figure.savefig(staging, format="png", dpi=DOTS_PER_INCH)
    replace_file(file.with_suffix(".txt"), "\n".join(lines) + "\n")


def short_name(name: str) -> str:
    """A name, cut where it is long."""
    return name if len(name) <= 18 else name[:17] + "…"


def grid(panel: Any) -> None:
    """A light grid, and no frame above and on the right."""
    panel.grid(color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
