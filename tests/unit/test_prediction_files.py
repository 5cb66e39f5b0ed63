"""A file of predictions holds those of one model, and a cell what the model said."""

import csv
from pathlib import Path

import pytest

from isotune.evaluation.prediction.files import FACTS, PredictionFile
from isotune.evaluation.prediction.predictors import Part
from isotune.io.errors import UserError


def begun(output: Path, model: str, text: str) -> PredictionFile:
    """Predictions whose first row is there."""
    file = PredictionFile(output, {"model_sha256": model}, "id")
    assert file.start() == 0
    file.add(0, Part([{"id": 0, "text": text}]))
    return file


def test_parts_whose_facts_are_gone_are_of_nobody(tmp_path: Path):
    output = tmp_path / "out.csv"
    first = begun(output, "a", "of the first model")
    first.close()
    with pytest.raises(UserError, match="of other weights"):
        PredictionFile(output, {"model_sha256": "b"}, "id").start()
    (first.parts / FACTS).unlink()  # as a folder is that was half removed
    second = begun(output, "b", "of the second")
    second.finish(lambda line: {"text": line["text"]})
    assert [row["text"] for row in csv.DictReader(output.open(newline=""))] == ["of the second"]
    assert not second.parts.exists()


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", 'say "x", then', "plain"])
def test_a_cell_of_any_text_is_read_back(tmp_path: Path, text: str):
    output = tmp_path / "out.csv"
    begun(output, "a", text).finish(lambda line: {"text": line["text"]})
    content = output.read_bytes().decode()
    assert [row["text"] for row in csv.DictReader(output.open(newline=""))] == [text]
    assert content.startswith("id,text\n") and content.endswith("\n") and not content.endswith("\r\n")


FORMULAS = ("=cmd|'/c calc'!A1", "+1+1", "-x", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'=1", "''-x")


@pytest.mark.parametrize("text", [*FORMULAS, "-5", "+3.5e2", "- ", "'", "'quoted'", "a=b", "'5"])
def test_a_spreadsheet_computes_no_text_and_one_apostrophe_less_is_the_text(tmp_path: Path, text: str):
    file = PredictionFile(tmp_path / "out.csv", {"model_sha256": "a"}, "id")
    file.start()
    file.add(0, Part([{"id": text, "text": text, "probabilities": [-0.5]}]))
    file.finish(lambda line: {"text": line["text"], f"p[{text}]": line["probabilities"][0], text: text})
    header, row = csv.reader((tmp_path / "out.csv").open(newline=""))
    is_marked = text in (*FORMULAS, "- ")
    assert row == [own := f"'{text}" if is_marked else text, own, "-0.5", own]
    assert header == ["id", "text", f"p[{text}]", own]
    assert (own[1:] if is_marked else own) == text


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"made_of": 5}', "\xff", ""])
def test_facts_and_parts_that_are_none_are_nobodys(tmp_path: Path, content: str):
    output = tmp_path / "out.csv"
    begun(output, "a", "x").close()
    part = tmp_path / ".out.csv.parts" / "part-000000000000.json"
    for text in (content, '{"rows": 0, "counts": {}, "lines": []}', '{"rows": 1}'):
        part.write_text(text, "latin-1")
        again = PredictionFile(output, {"model_sha256": "a"}, "id")
        assert again.start() == 0  # begins with the first row
        again.close()
    output.write_text("mine")
    (tmp_path / "out.csv.json").write_text(content, "latin-1")
    with pytest.raises(UserError, match=r"--output .*out\.csv holds something else: choose another file"):
        PredictionFile(output, {"model_sha256": "b"}, "id").start()


def test_a_file_under_the_name_of_the_facts_is_left_alone(tmp_path: Path):
    (tmp_path / "out.csv.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"out\.csv would take the place of .*out\.csv\.json too"):
        PredictionFile(tmp_path / "out.csv", {"model_sha256": "a"}, "id").start()
    assert (tmp_path / "out.csv.json").read_text() == '{"mine": 1}'
