"""RUN/report.html: one self-contained and accessible file with the settings, curves and results of a run."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from isotune import __version__
from isotune.io.errors import UserError
from isotune.io.files import replace_file
from isotune.report import formatting
from isotune.report.charts import draw_charts
from isotune.report.evaluations import gather_evaluations
from isotune.report.run_record import changed_tables, read_record, run_summary, run_tables

REPORT = "report.html"
HERE = Path(__file__).parent
# characters that HTML does not allow, and lone surrogates, which UTF-8 cannot encode
_FORBIDDEN = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)], "\N{REPLACEMENT CHARACTER}"
)


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, atomically: by default report.html of the first run.

    The file loads no other resource, and its content security policy forbids it. Raises UserError if a folder is no run
    or the file cannot be written.
    """
    html = render_report(runs)
    file = Path(output) if output is not None else Path(runs[0]) / REPORT
    try:
        replace_file(file, html)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
    return file


def render_report(runs: Sequence[str | Path]) -> str:
    """The report as HTML."""
    records = [read_record(run) for run in runs]
    notes = [note for record in records for note in record.notes]
    tables = run_tables(records)
    several = len(records) > 1
    names = [
        f"{formatting.run_letter(i)}: {record.name}" if several else record.name for i, record in enumerate(records)
    ]
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # every value comes from a run's files, and none is markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formatting.format_number,
        "signed": formatting.format_signed,
        "p": formatting.format_p,
    }
    html = environment.get_template("report.html.jinja").render(
        title=" and ".join(record.name for record in records),
        version=__version__,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        runs=[(name, record, run_summary(record)) for name, record in zip(names, records, strict=True)],
        names=names,
        several=several,
        charts=draw_charts(records),
        tables=tables,
        differences=changed_tables(tables) if several else [],
        evaluations=gather_evaluations(records, notes),
        notes=notes,
        formatting=formatting,
    )
    return html.lstrip().translate(_FORBIDDEN)
