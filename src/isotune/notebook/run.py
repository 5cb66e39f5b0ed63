"""A run as an object: what it is, how it went, and what can be asked of it."""

import base64
import contextlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from isotune.commands import train
from isotune.config.recipes import project_of, task_of
from isotune.evaluation.results import Result, find_results, read_result
from isotune.io.errors import UserError, did_you_mean
from isotune.io.reading import Unreadable, read_bytes
from isotune.notebook.launching import as_flags, run_command
from isotune.report.formatting import comparison_text, format_number
from isotune.report.run_record import RunRecord, read_record, run_summary

Messages = Sequence[Mapping[str, Any]]


def classify(data: str | Path, *, model: str | None = None, **keys: Any) -> "Run":
    """Train a classifier on labelled texts: a file, a folder, a Hub id, a recipe's file or its name.

    `keys` are those of a recipe (`isotune classify --help-all`), and `processes` and `engine` of the launch. Raises
    UserError for a mistake, before anything is trained, RunFault, and Preempted where it was stopped.
    """
    return _train("classify", data, model, keys)


def sft(data: str | Path, *, model: str | None = None, **keys: Any) -> "Run":
    """Train a causal language model on conversations; as `classify`, with the keys of `isotune sft --help-all`."""
    return _train("sft", data, model, keys)


def load(run: str | Path) -> "Run":
    """The run in a folder, finished or not; UserError where there is none."""
    return Run(Path(read_record(run).folder))


def _train(command: str, data: str | Path, model: str | None, keys: Mapping[str, Any]) -> "Run":
    launch = {"num_processes": keys.get("processes"), "engine": keys.get("engine")}
    own = {name: value for name, value in keys.items() if name not in ("processes", "engine")}
    words = [str(data), *as_flags({"model_name_or_path": model, **own})]
    full = train.recipe_words(command, words, show=False)
    recipe = train.KINDS[command].read(full, default_config=None, prog=f"isotune.{command}")
    run_command([command, *words, *as_flags(launch)])
    return Run(Path(recipe.output_dir))


@dataclass(frozen=True)
class Run:
    """A run's folder; what is read from it is read anew each time."""

    path: Path

    @property
    def record(self) -> RunRecord:
        """Everything that the run wrote down."""
        return read_record(self.path)

    @property
    def results(self) -> dict[str, "Evaluated"]:
        """Its evaluations by their names."""
        return {folder.name: Evaluated(read_result(folder)) for folder in find_results(self.path)}

    @property
    def is_classifier(self) -> bool:
        """Whether it classifies; else it answers."""
        return task_of(self.record.keys) == "classification"

    def evaluate(self, **flags: Any) -> "Evaluated":
        """`isotune eval RUN`, on the run's own evaluation data unless the flags name others."""
        before = {folder: (folder / "metrics.json").stat().st_mtime_ns for folder in find_results(self.path)}
        run_command(["eval", str(self.path), *as_flags(flags)])
        if (named := flags.get("output_dir")) is not None:
            return Evaluated(read_result(Path(named)))
        written = [f for f in find_results(self.path) if (f / "metrics.json").stat().st_mtime_ns != before.get(f)]
        if not written:
            raise UserError(f"the evaluation wrote no result in {self.path / 'eval'}")
        return Evaluated(read_result(max(written, key=lambda folder: (folder / "metrics.json").stat().st_mtime_ns)))

    def predict(self, texts: str | Sequence[str | tuple[str, str] | Messages], **decoding: Any) -> list[Any]:
        """The class and the probability of each text or pair, or the answer to each question or list of messages.

        The model is loaded into this process at the first call, and stays. `decoding` is of answers: max_new_tokens,
        temperature, top_p, seed.
        """
        asked: list[Any] = [texts] if isinstance(texts, str) else list(texts)
        if self.is_classifier:
            if decoding:
                raise UserError(f"{next(iter(decoding))} is of answers, and {self.path} classifies")
            from isotune.evaluation.classification.sentences import predict_texts

            if project_of(self.record.keys) is not None:
                raise UserError(f"{self.path} reads battles and no texts: isotune predict takes a file of them")
            return predict_texts(self._model, asked)
        from isotune.evaluation.generation.chat import answers
        from isotune.evaluation.generation.completion import Decoding

        known = [own.name for own in fields(Decoding)]
        if unknown := [name for name in decoding if name not in known]:
            raise UserError(f"{unknown[0]} is nothing of an answer{did_you_mean(unknown[0], known)}")
        how = Decoding(**decoding)
        return answers(self._model, asked, how)

    @cached_property
    def _model(self) -> Any:
        import torch

        from isotune.distributed.device import choose_device
        from isotune.evaluation.models import generation_model_of_run, load_run_classifier

        if not self.is_classifier:
            return generation_model_of_run(self.path)
        return load_run_classifier(self.path, torch.device(choose_device()), torch.float32)

    def compare(self, *others: "Run | str | Path", **options: Any) -> "Compared":
        """Whether other runs differ from this one on the same evaluated rows (`isotune compare`)."""
        from isotune.evaluation.comparison import compare_runs

        runs = [self.path, *(other.path if isinstance(other, Run) else Path(other) for other in others)]
        return Compared(compare_runs(runs, **options))

    def report(self, *others: "Run | str | Path", output: str | Path | None = None) -> "Report":
        """The page of this run, or of several side by side, as a file and as a picture in a notebook."""
        from isotune.report.html_report import write_report

        runs = [self.path, *(other.path if isinstance(other, Run) else Path(other) for other in others)]
        return Report(write_report(runs, output))

    def _repr_html_(self) -> str:
        """Curve, facts, and the metrics with their intervals."""
        record = self.record
        rows = "".join(_row(name, value) for name, value in run_summary(record))
        picture, name = self.path / "loss_curve.png", html.escape(record.name)
        curve = ""
        with contextlib.suppress(FileNotFoundError, Unreadable):
            data = base64.b64encode(read_bytes(picture, root=self.path)).decode()
            curve = (
                f'<img alt="loss curve of {html.escape(record.name)}" src="data:image/png;base64,{data}" width="480">'
            )
        results = "".join(result._repr_html_() for result in self.results.values())
        return f"<h4>{name}</h4><table>{rows}</table>{curve}{results}"


@dataclass(frozen=True)
class Evaluated:
    """A result: `metrics` by name, `intervals` of 95%, `predictions` by row."""

    result: Result

    @property
    def metrics(self) -> dict[str, float]:
        """By name."""
        return self.result.metrics

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """[low, high] of 95%, by the metric's name."""
        return self.result.intervals

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """Of each row, in the order of the data."""
        return self.result.predictions

    def _repr_html_(self) -> str:
        """A table of every metric with its interval."""
        rows = ["<tr><th>metric</th><th>value</th><th>95% interval</th></tr>"]
        for name, value in self.metrics.items():
            low_high = self.intervals.get(name)
            interval = " to ".join(map(format_number, low_high)) if low_high else ""
            rows.append(_row(name, format_number(value), interval))
        facts = self.result.facts
        title = html.escape(f"{facts['dataset_name']} ({facts['dataset_split']}), {facts['rows']:,} rows")
        return f"<table><caption>{title}</caption>{''.join(rows)}</table>"

    def __repr__(self) -> str:
        """The metrics, a line each."""
        return "\n".join(f"{name}: {format_number(value)}" for name, value in self.metrics.items())


@dataclass(frozen=True)
class Compared:
    """A comparison, as `isotune compare` prints it."""

    comparison: Any

    def __repr__(self) -> str:
        """As on a terminal."""
        return comparison_text(self.comparison)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return f"<pre>{html.escape(repr(self))}</pre>"


@dataclass(frozen=True)
class Report:
    """A page that stands in a file."""

    file: Path

    def _repr_html_(self) -> str:
        """The page, in a frame of its own that runs none of its scripts' outside requests."""
        page = html.escape(self.file.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="640" title="report"></iframe>'


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"
