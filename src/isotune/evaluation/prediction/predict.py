"""All rows of a source, predicted part by part on the processes of a launch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isotune.config.recipes import NO_IDS
from isotune.data.documents import digest, with_share
from isotune.data.pieces import in_threads
from isotune.data.sources.hub import opened_repositories
from isotune.data.sources.source import Row, Source, surrogate_fault
from isotune.distributed.ranks import call_on_main
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.prediction.files import PredictionFile, Written
from isotune.evaluation.prediction.predictors import LEFT_OUT, LeftOut, Part, Predictor
from isotune.io.cache_root import disk_errors_named
from isotune.io.errors import UserError
from isotune.models.base.folder import digest_of_model

ID = "id"  # the column that is kept where the user names none; the rows are numbered from 0 where there is none
TAKEN = ("prediction", "prediction_name", "prediction_names", "probabilities", "text", "tokens", "ended", LEFT_OUT)


@dataclass(frozen=True)
class _Taken:
    """Rows with the same part, from number `first` on."""

    first: int
    ids: list[Any]
    items: list[Any]  # what the model needs of each, or why it is left out

    @property
    def wanted(self) -> list[tuple[int, Any]]:
        """The rows to predict, each with its number."""
        return [(self.first + at, item) for at, item in enumerate(self.items) if not isinstance(item, LeftOut)]


@dataclass(frozen=True)
class _Rows:
    """The rows of a source as a predictor takes them, with the ids that they keep."""

    source: Source
    predictor: Predictor
    id_field: str | None
    limit: int | None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The id of each row, and what the model needs of it; UserError for a broken row."""
        column: str | None = None
        for number, row in enumerate(islice(self.source.rows(), self.limit)):
            column = self.column_of(row) if number == 0 else column
            yield self._id(row, number, column), self.predictor.take(row, self.source, number)

    def column_of(self, first: Row) -> str | None:
        """The column of ids by the first row; None where rows are numbered."""
        if self.id_field == NO_IDS:
            return None
        return self.id_field or (ID if ID in first else None)

    def _id(self, row: Row, number: int, column: str | None) -> Any:
        if column is None:
            return number
        if column not in row:
            raise self.source.lacks(number, row, column, f"dataset_id_field, which {NO_IDS} switches off")
        own = row[column]
        if isinstance(own, str) and (fault := surrogate_fault(own)):
            raise UserError(f"{self.source.where(number)}, column {column!r}, {fault}")
        return own if isinstance(own, str | int | float) or own is None else str(own)

    def parts(self, skipped: int, size: int) -> Iterator[_Taken]:
        """The rows behind the first `skipped` ones, `size` at a time."""
        rows, first = islice(iter(self), skipped, None), skipped
        while part := list(islice(rows, size)):
            yield _Taken(first, [own for own, _ in part], [item for _, item in part])
            first += len(part)


def predict_source(
    source: Source,
    predictor: Predictor,
    output: Path,
    ranks: Ranks,
    *,
    model: str,
    model_sha256: str,
    id_field: str | None = None,
    limit: int | None = None,
    part_rows: int | None = None,
) -> Written | None:
    """Predict the first `limit` rows, and write a line for each to `output`, in their order; None on other ranks.

    All rows are read once before any is predicted: a broken one is a UserError that names it, and nothing is written.
    A run that was stopped goes on; see `isotune.evaluation.prediction.files`. AlreadyDone where nothing is left to do.
    """
    if id_field in TAKEN:
        raise UserError(f"dataset_id_field is {id_field!r}, which the predictions have a column of their own for")
    rows = _Rows(source, predictor, id_field, limit)
    total = sum(1 for _ in rows)
    facts = {
        "model": model,
        "model_sha256": model_sha256,
        "dataset_name": source.name,
        "data": source.fingerprint,
        "dataset_id_field": id_field,
        "limit": limit,
        **predictor.facts,
    }
    file = PredictionFile(output, facts, rows.column_of(next(source.rows())) or ID)
    with closing(file), disk_errors_named(output.parent):
        done = call_on_main(ranks, file.start)
        if done and ranks.is_main:
            print(f"goes on     behind the {done:,} rows of {total:,} that are predicted already", flush=True)
        size = part_rows or predictor.part_rows
        with tqdm(total=total, initial=done, unit=" rows", disable=not ranks.is_main) as bar:
            for taken, prepared in in_threads(rows.parts(done, size), lambda part: _prepare(predictor, part)):
                part = _whole(taken, predictor.predict(prepared, ranks) if taken.wanted else Part([]), file.id_column)
                if ranks.is_main:
                    file.add(taken.first, part)
                bar.update(len(taken.items))
        return file.finish(predictor.flat) if ranks.is_main else None


def _prepare(predictor: Predictor, part: _Taken) -> Any:
    return predictor.prepare(part.wanted) if part.wanted else None


def _whole(taken: _Taken, predicted: Part, id_column: str) -> Part:
    """The lines of all rows of a part, with their ids; one that was left out says why."""
    lines = iter(predicted.lines)
    said = [{LEFT_OUT: item.reason} if isinstance(item, LeftOut) else next(lines) for item in taken.items]
    return Part(
        [{id_column: own, **line} for own, line in zip(taken.ids, said, strict=True)], Counter(predicted.counts)
    )


def digest_of_models(places: Sequence[str | Path]) -> str:
    """SHA-256, in hexadecimal, of the models in these folders, and of the names and commits of those on the Hub."""
    parts: list[Any] = []
    for place in places:
        if Path(place).is_dir():
            parts.append(digest_of_model(Path(place)))
        else:
            parts.append([str(place), *(commit for _, own, *_, commit in opened_repositories() if own == str(place))])
    return digest(*parts)


def summary_lines(written: Written, output: Path) -> list[str]:
    """What became of the rows, for the terminal."""
    lines = [f"rows        {written.rows:,}"]
    for reason, count in written.left_out.items():
        lines.append(f"left out    {with_share(count, written.rows)}: {reason}")
    lines += [f"            {with_share(count, written.rows)} {what}" for what, count in written.counts.items()]
    return [*lines, f"written to {output}"]
