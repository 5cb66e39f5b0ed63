"""A plot of memory and step time against the number of processes."""

from collections import defaultdict
from pathlib import Path

from isotune.preflight.preflight_report import ComparedLaunch, PreflightReport


def draw_scaling(report: PreflightReport, file: Path) -> Path:
    """Draw the comparison of a report; without a device there is no panel of times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[ComparedLaunch]] = defaultdict(list)
    for row in report.rows:
        lines[row.launch.in_words.split(" on ")[0]].append(row)
    timed = all(row.time for row in report.rows)
    figure, panels = pyplot.subplots(1, 2 if timed else 1, figsize=(10 if timed else 5.5, 4), squeeze=False)
    for name, rows in lines.items():
        sizes = [row.launch.world_size for row in rows]
        panels[0][0].plot(sizes, [row.memory.total / 2**30 for row in rows], marker="o", label=name)
        if timed:
            panels[0][1].plot(sizes, [row.time.expected for row in rows if row.time], marker="o", label=name)
    panels[0][0].set_ylabel("GiB on a process")
    if report.limit is not None:
        panels[0][0].axhline(report.limit / 2**30, linestyle="--", color="black", label="memory of a process")
    if timed:
        panels[0][1].set_ylabel("expected seconds a step")
        panels[0][1].set_yscale("log")
    counts = sorted({row.launch.world_size for row in report.rows})
    for panel in panels[0]:
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_xlabel("processes")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file
