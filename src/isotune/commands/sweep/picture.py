"""The picture of a sweep: the metric of every trial, each seed a dot, the best trial on top and the default a line."""

from pathlib import Path

from isotune.commands.sweep.ranking import Ranking, table
from isotune.evaluation.classification.figures import COLOURS, grid, new_figure, save_plot

FILE = "ranking.png"
MOST_SHOWN = 40  # trials; more are not readable


def draw_ranking(ranking: Ranking, folder: Path) -> Path:
    """Write the picture, with the table beside it as its alternative text."""
    complete = [trial for trial in ranking.trials if trial.scores]
    shown = complete[:MOST_SHOWN]
    metric = ranking.metric.removeprefix("eval_").replace("_", " ")
    figure, panel = new_figure(8.0, 1.6 + 0.28 * len(shown))
    for place, trial in enumerate(shown):
        colour = COLOURS[1] if trial.number == 0 else COLOURS[0]
        panel.plot(trial.scores, [place] * len(trial.scores), "o", color=colour, alpha=0.45, markersize=5)
        panel.plot([trial.mean], [place], "|", color=colour, markersize=14, markeredgewidth=2.5)
    panel.axvline(ranking.default.mean, color=COLOURS[1], linewidth=1.0, linestyle="--")
    panel.set_yticks(range(len(shown)), [trial.name + (" (default)" * (trial.number == 0)) for trial in shown])
    panel.invert_yaxis()
    better = "higher" if ranking.higher_is_better else "lower"
    panel.set_xlabel(f"{metric} of the rows that chose ({better} is better); a dot each seed, a bar the mean")
    of_all = f", the best {len(shown)} of {len(complete)}" if len(shown) < len(complete) else ""
    panel.set_title(f"{len(complete)} trials over {len(ranking.seeds)} seeds{of_all}", loc="left", fontsize=12)
    grid(panel)
    save_plot(figure, folder / FILE, [f"The {metric} of {len(complete)} trials, ranked", *table(ranking)])
    return folder / FILE
