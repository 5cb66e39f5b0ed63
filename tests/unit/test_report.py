"""The report says what the run's files say, whatever is in them, in one file that loads and runs nothing."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from isotune.cli import main
from isotune.evaluation.comparison import compare_runs
from isotune.evaluation.results import write_result
from isotune.evaluation.samples import write_samples
from isotune.evaluation.statistics.resampling import Scores
from isotune.io.errors import UserError
from isotune.report import html_report
from isotune.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, draw_charts
from isotune.report.html_report import render_report, write_report
from isotune.report.run_record import read_record

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp; \ud800 \x00 \u202e"
VOID = {"meta", "link", "img", "br", "line", "circle", "path", "hr", "input"}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001e221bc33"
    "0000000049454e44ae426082"
)


class Page(HTMLParser):
    """The elements of a page as a browser would find them: (tag, attributes, text inside), in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_data(" ")
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, *tags):
        return [element for element in self.elements if element[0] in tags]

    def text(self, tag):
        return [" ".join(element[2].split()) for element in self.all(tag)]

    def rows(self):
        """Every row of every table, as the texts of its cells."""
        found, current = [], None
        for tag, _, text in self.elements:
            if tag == "tr":
                current = []
                found.append(current)
            elif tag in ("th", "td") and current is not None:
                current.append(" ".join(text.split()))
        return found


def write_run(folder, steps=12, **keys):
    """A run folder as training leaves it, made by hand so that every number is known."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"model_name_or_path": "builtin:opt-tiny", "dataset_name": "builtin:greetings", "tune": "full"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in {**recipe, "learning_rate": 0.001, **keys}.items()]
    (folder / "recipe.yaml").write_text("# Model\n" + "\n".join(lines[:1]) + "\n\n# The rest\n" + "\n".join(lines[1:]))
    environment = {
        "versions": {"torch": "2.13.0"},
        "in_effect": {"engine": "DeepSpeedEngine", "zero_stage": 2, "trained_parameters": 5, "all_parameters": 10},
        "data": {"train": {"source": "builtin:greetings", "read": 1234, "dropped": {"empty": 3}}},
        "command": ["python", "train/sft_opt.py"],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "status.json").write_text(json.dumps({"status": "finished", "step": steps, "message": None}))
    entries = [
        {"step": n, "loss": 4.0 / n, "grad_norm": 1.0, "learning_rate": 1e-3, "step_seconds": 0.5, "input_tokens": 100}
        for n in range(1, steps + 1)
    ]
    if steps:
        entries.append({"step": steps, "eval_loss": 0.75, "eval_perplexity": 2.117})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def facts(kind, dataset_name="builtin:opinions", **more):
    return {"kind": kind, "model": "m", "dataset_name": dataset_name, "dataset_split": "test", **more}


def classify(run, right, name="test", rows=60):
    """An evaluation of two classes in which the first `right` rows are right, each surer than the one before."""
    predictions = []
    for i in range(rows):
        sure = 0.6 + 0.3 * i / rows
        share = sure if (i % 2 == 1) == (i < right) else 1 - sure
        predictions.append({"id": i, "label": i % 2, "probabilities": [1 - share, share]})
    where = run / "eval" / name
    metrics = {"accuracy": right / rows, "f1_class_1": 0.5}
    write_result(
        where,
        facts("classification", label_names=["bad", "good"]),
        Scores(metrics, {"accuracy": (0.25, 0.5)}),
        predictions,
        ["text"] * rows,
    )
    return where


def generate(run, texts, prompt="What?", reference="Yes.", name="asked"):
    predictions = [
        {"id": i, "prompt": prompt, "reference": reference, "text": text, "exact_match": float(text == reference)}
        for i, text in enumerate(texts)
    ]
    where = run / "eval" / name
    scores = Scores({"exact_match": 0.5}, {"exact_match": (0.1, 0.9)})
    write_result(where, facts("generation"), scores, predictions, ["text"] * len(texts))
    return where


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "runs" / "first")
    classify(folder, 40)
    generate(folder, ["Yes.", "No."])
    return folder


def test_a_report_says_what_the_files_say(run):
    page = Page(render_report([run]))
    rows = page.rows()
    for expected in (
        ["engine", "DeepSpeedEngine"],
        ["zero_stage", "2"],
        ["torch", "2.13.0"],
        ["read", "1,234"],
        ["dropped: empty", "3"],
        ["learning_rate", "0.001"],
        ["command", "python train/sft_opt.py"],
        ["accuracy", "0.6667", "0.2500 to 0.5000"],
        ["exact_match", "0.5000", "0.1000 to 0.9000"],
    ):
        assert expected in rows
    facts = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert facts["Steps"] == "12"
    assert facts["Loss of the last step"] == "0.3333"
    assert facts["Lowest evaluation loss"] == "0.7500 at step 12"
    assert facts["Tokens seen"] == "1,200"
    assert facts["Trained"] == "full: 5 of 10 parameters (50.0%)"


def test_lines_of_several_steps_are_called_so(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [
        {"step": 50 * n, "loss": 4.0 / n, "step_seconds": 25.0, "input_tokens": 5000, "steps": 50} for n in range(1, 13)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(render_report([run]))
    facts = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert (facts["Steps"], facts["Loss of the last 50 steps"], facts["Tokens seen"]) == ("600", "0.3333", "60,000")
    assert facts["Time in steps"] == "5 min"
    text = render_report([run])
    assert "training, each 50 steps" in text and "training, averaged over 200 steps" in text


def test_a_metric_that_the_rows_do_not_define_is_said_to_be_undefined(tmp_path):
    where, undefined = tmp_path / "run" / "eval" / "test", ["precision_class_1"]
    row = {"id": 0, "label": 0, "probabilities": [0.9, 0.1]}
    given = facts("classification", label_names=["bad", "good"], undefined=undefined)
    write_result(where, given, Scores({"accuracy": 1.0}, {}, undefined), [row], ["text"])
    assert ["precision_class_1", "undefined", ""] in Page(render_report([tmp_path / "run"])).rows()


def test_confident_errors_come_first_with_their_texts(run):
    example = {"id": 59, "actual": "good", "predicted": "bad", "text": "the surest of all"}
    (run / "eval/test/examples.jsonl").write_text(json.dumps(example) + "\n")
    page = Page(render_report([run]))
    examples = [text for text in page.text("li") if "probability" in text]
    assert len(examples) == 10
    sure = 0.6 + 0.3 * 59 / 60
    assert examples[0] == f"the surest of all Row 59 Actual good first wrong bad, probability {sure:.3f}"
    shown = [float(re.search(r"probability (\S+)", text)[1]) for text in examples]
    assert shown == sorted(shown, reverse=True)


def test_several_runs_stand_side_by_side_with_what_differs_and_who_is_better(tmp_path, run):
    second = write_run(tmp_path / "runs" / "second", steps=20, learning_rate=0.01)
    classify(second, 58)
    generate(second, ["Yes.", "Yes."])
    page = Page(render_report([run, second]))
    (different,) = [text for text in page.text("table") if text.startswith("Values on which the runs disagree")]
    assert "learning_rate 0.001 0.01" in different
    assert "dataset_name" not in different
    assert ["Metric", "A: first", "95% interval", "B: second", "95% interval"] in page.rows()
    assert "B is better in accuracy" in " ".join(page.text("p"))
    assert any(row[0] == "exact_match" and row[-1] == "no difference shown" for row in page.rows())
    assert any("No." in text and "A: first" in text and "B: second" in text for text in page.text("li"))


def test_runs_of_other_rows_are_shown_and_not_compared(tmp_path, run):
    second = write_run(tmp_path / "runs" / "second")
    classify(second, 30, rows=50)
    page = Page(render_report([run, second]))
    assert any(text.startswith("Not compared: ") and "10 rows only in" in text for text in page.text("p"))


def test_the_letters_are_those_of_the_runs_that_were_evaluated(tmp_path, run):
    middle = write_run(tmp_path / "runs" / "middle")
    third = write_run(tmp_path / "runs" / "third")
    classify(third, 60)
    text = " ".join(Page(render_report([run, middle, third])).text("p"))
    assert "C is better in accuracy" in text


def test_a_run_without_an_evaluation_and_one_without_steps_have_a_report(tmp_path):
    for steps in (0, 1, 2):
        html = render_report([write_run(tmp_path / str(steps), steps=steps)])
        assert ("<svg" in html) == bool(steps)
        assert "Evaluation test" not in html


def test_an_evaluation_without_a_run_has_a_report(tmp_path):
    classify(tmp_path / "model", 30)
    assert ["accuracy", "0.5000", "0.2500 to 0.5000"] in Page(render_report([tmp_path / "model"])).rows()


def test_an_evaluation_of_another_kind_shows_its_metrics(tmp_path):
    where = tmp_path / "model" / "eval" / "tasks"
    write_result(where, facts("lm_eval"), Scores({"boolq/acc": 0.625}, {}), [{"id": 0, "document": "d"}], ["text"])
    page = Page(render_report([tmp_path / "model", tmp_path / "model"]))
    assert ["boolq/acc", "0.6250", "", "0.6250", ""] in page.rows()
    assert any("of the kind 'lm_eval' cannot be compared" in text for text in page.text("p"))


def test_nothing_in_the_files_becomes_markup(tmp_path):
    first = write_run(tmp_path / "runs" / "<b>one", model_name_or_path=HOSTILE.replace("\x00", ""), steps=3)
    generate(first, [HOSTILE, "Yes."], prompt=HOSTILE, reference=HOSTILE)
    where = classify(first, 20, name="<i>name")
    example = {"id": 59, "actual": HOSTILE, "predicted": HOSTILE, "text": HOSTILE}
    (where / "examples.jsonl").write_text(json.dumps(example) + "\n")
    (where / "picture.png").write_bytes(PNG)
    (where / "picture.txt").write_text("<script>alert(3)</script>\n" + HOSTILE.replace("\ud800", ""))
    (first / "metrics.jsonl").open("a").write("<script>")
    (first / "status.json").write_text(json.dumps({"status": HOSTILE, "message": HOSTILE}))
    second = write_run(tmp_path / "runs" / "two")
    generate(second, ["Yes.", HOSTILE], prompt=HOSTILE, reference=HOSTILE)
    html = write_report([first, second]).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.all("script", "iframe", "object", "embed", "link", "form", "base", "b", "i")
    assert [element[1]["src"][:22] for element in page.all("img")] == ["data:image/png;base64,"]
    assert not [name for element in page.elements for name in element[1] if name.startswith("on")]
    assert "<script>alert(1)</script>" in " ".join(page.text("dd"))
    assert "\x00" not in html


def test_nothing_is_loaded_from_anywhere(run):
    (run / "eval/test/picture.png").write_bytes(PNG)
    html = render_report([run])
    page = Page(html)
    links = [element[1][name] for element in page.elements for name in ("src", "href", "srcset") if name in element[1]]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"url\(|@import|http-equiv=.refresh", html)
    policy = next(e[1]["content"] for e in page.all("meta") if e[1].get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_page_is_built_for_screen_readers(tmp_path, run):
    (run / "eval/test/confusion.png").write_bytes(PNG)
    (run / "eval/test/confusion.txt").write_text("40 of 60 rows are right.\nbad: 20 of 30\n")
    (run / "eval/test/no_words.png").write_bytes(PNG)
    second = write_run(tmp_path / "runs" / "second")
    classify(second, 50)
    html = render_report([run, second])
    page = Page(html)
    assert page.all("html")[0][1]["lang"] == "en"
    levels = [int(element[0][1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(element[1].get("scope") in ("col", "row", "rowgroup") for element in page.all("th"))
    alternatives = [element[1]["alt"] for element in page.all("img")]
    assert alternatives == ["40 of 60 rows are right.", "no words, of the evaluation test"]
    assert "bad: 20 of 30" in page.text("details")[0] + " ".join(page.text("p"))
    identities = [element[1]["id"] for element in page.elements if "id" in element[1]]
    assert len(identities) == len(set(identities))
    targets = [element[1]["href"][1:] for element in page.all("a")]
    assert targets[0] == "content" and set(targets) <= set(identities)
    charts = [element for element in page.all("svg") if element[1].get("role") == "img"]
    assert charts and all(set(element[1]["aria-labelledby"].split()) <= set(identities) for element in charts)


def test_a_curve_runs_through_the_values_of_the_metrics(run):
    (loss, *_) = draw_charts([read_record(run)])
    raw = next(line for line in loss.lines if line.style == "raw")
    (path,) = raw.paths
    points = np.array([[float(n) for n in pair.split(",")] for pair in path[1:].split(" L")])
    (x0, first), (x1, last) = ((x, float(text.replace(",", ""))) for x, text in (loss.x_ticks[0], loss.x_ticks[-1]))
    (y0, low), (y1, high) = ((y, float(text)) for y, text in (loss.y_ticks[0], loss.y_ticks[-1]))
    assert (x0, x1, y0, y1) == (LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP)
    steps = first + (points[:, 0] - x0) / (x1 - x0) * (last - first)
    losses = low + (points[:, 1] - y0) / (y1 - y0) * (high - low)
    np.testing.assert_allclose(steps, np.arange(1, 13), atol=0.01)
    np.testing.assert_allclose(losses, 4.0 / np.arange(1, 13), atol=0.005)


def test_all_curves_are_over_the_same_steps(run):
    loss, *others = draw_charts([read_record(run)])
    assert {"Perplexity of the evaluation", "Speed", "Gradient norm"} & {chart.title for chart in others}
    assert all(chart.x_ticks == loss.x_ticks for chart in others)


def test_the_texts_of_the_recipe_and_how_to_serve_the_run_are_shown(tmp_path):
    folder = write_run(tmp_path / "my runs" / "one")
    assert "Page and API" not in Page(render_report([folder])).text("dt")
    (folder / "model").mkdir()
    write_samples(folder, [{"input": "A fine meal <b>", "output": "good", "probability": "0.912", "true": "bad"}])
    page = Page(render_report([folder]))
    found = list(zip(page.text("dt"), page.text("dd"), strict=True))
    assert ("Page and API", f"isotune serve '{folder}'") in found
    assert found[-3:] == [("output", "good"), ("probability", "0.912"), ("true", "bad")]
    assert "A fine meal <b>" in page.text("p")
    (folder / "samples.json").write_text('{"samples": [3, {"input": "a"}]}')
    assert "A fine meal" not in render_report([folder])


def test_a_long_run_keeps_its_peaks_and_a_lost_loss_leaves_a_gap(tmp_path):
    folder = write_run(tmp_path / "long", steps=0)
    losses = dict.fromkeys(range(1, 5001), 1.0) | {777: 9.0, 3000: None}
    lines = [json.dumps({"step": step, "loss": loss, "grad_norm": 2.0}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (loss, *_) = draw_charts([read_record(folder)])
    raw = next(line for line in loss.lines if line.style == "raw")
    assert len(raw.paths) == 2
    assert 50 < sum(path.count(",") for path in raw.paths) < 700
    assert min(float(pair.split(",")[1]) for path in raw.paths for pair in path[1:].split(" L")) < TOP + 30
    assert "highest 9.0000 at step 777" in loss.summary


def test_what_a_link_leads_out_of_the_run_is_left_out_and_said(tmp_path, run):
    """A run of somebody else's may have a link to a file of the reader's, whose report would then hold it."""
    private, own = tmp_path / "private", run / "eval" / "test"
    classify(private, 20, name="of_mine")
    outside = {
        own / "matrix.png": PNG, own / "words.txt": b"private text",
        own / "examples.jsonl": b'{"id": 0, "actual": "a", "predicted": "b", "text": "private text"}\n',
        run / "environment.json": b'{"device": "private text"}', run / "status.json": b'{"status": "private text"}',
    }  # fmt: skip
    (own / "kept.png").write_bytes(PNG)
    (own / "kept.txt").symlink_to("inside.txt")  # within the run a link is what it is elsewhere
    (own / "inside.txt").write_text("A sentence about it.")
    (own / "words.png").write_bytes(PNG)
    (run / "eval" / "of_mine").symlink_to(private / "eval" / "of_mine")
    for place, content in outside.items():
        (private / place.name).write_bytes(content)
        place.unlink(missing_ok=True)
        place.symlink_to(private / place.name)
    html, record = render_report([run]), read_record(run)
    assert "A sentence about it." in html and "private text" not in html and html.count("data:image/png") == 2
    for place in (*outside, run / "eval" / "of_mine"):
        assert any(str(place) in note and "a link that leads out" in note for note in Page(html).text("li")), place
    assert (record.environment, record.status) == ({}, {})
    with pytest.raises(UserError, match="has no evaluation 'of_mine'"):
        compare_runs([run, private], name="of_mine")
    for name in ("test", "asked"):
        (run / "eval" / name).rename(tmp_path / name)
    with pytest.raises(UserError, match="of_mine: it is a link that leads out of the run"):
        compare_runs([run, private])
    linked = tmp_path / "linked"  # the run itself may be anywhere
    linked.symlink_to(run)
    assert read_record(linked).steps == record.steps != {}


def test_a_cut_last_line_costs_no_other_and_is_said(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    record = read_record(run)
    assert list(record.steps) == list(range(1, 13))
    assert "line 14 cannot be read and is skipped" in record.notes[0]
    assert record.notes[0] in Page(render_report([run])).text("li")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("environment.json", "{", "environment.json cannot be read"),
        ("status.json", "[]", "status.json cannot be read: it has no keys"),
        ("recipe.yaml", "a: [", "recipe.yaml cannot be read"),
        ("eval/test/predictions.jsonl", '{"id": 0}\n{"id"', "An evaluation is left out"),
        ("eval/test/metrics.json", '{"kind": "classification"', "An evaluation is left out"),
        ("eval/test/picture.png", "no picture", "it is not a PNG file"),
    ],
)
def test_what_is_broken_is_named_and_the_rest_is_shown(run, name, content, says):
    (run / name).write_text(content)
    page = Page(render_report([run]))
    assert any(says in text for text in page.text("li"))
    assert ["exact_match", "0.5000", "0.1000 to 0.9000"] in page.rows()
    assert page.all("svg")


def test_values_of_another_form_cost_nothing_else(run):
    with (run / "metrics.jsonl").open("a") as file:
        for entry in ({"loss": "x"}, {"loss": [1], "step_seconds": "long", "input_tokens": None}, {"eval_loss": {}}):
            file.write(json.dumps({"step": 50, **entry}) + "\n")
    (run / "environment.json").write_text(json.dumps({"in_effect": [], "versions": "1", "data": {"train": 3}}))
    page = Page(render_report([run]))
    assert ["exact_match", "0.5000", "0.1000 to 0.9000"] in page.rows()
    assert page.all("svg")


def test_the_same_files_give_the_same_report(run):
    assert render_report([run]) == render_report([run])


def test_a_report_of_several_runs_takes_no_place_of_anything_else(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two", "three")]
    own = write_report(runs[:1])
    kept = own.read_bytes()
    beside = [write_report(runs[:2]), write_report(runs), write_report(runs[:2])]
    names = ["report-with-two.html", "report-with-two-three.html", "report-with-two.html"]
    assert [file.name for file in beside] == names and own.read_bytes() == kept
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    with pytest.raises(UserError, match=r"--output .*data\.jsonl is there and is no report"):
        write_report(runs[:1], data)
    assert data.read_text() == "{}\n"


def test_a_report_is_never_half_written(run, monkeypatch):
    file = write_report([run])
    assert file == run / "report.html"
    earlier = file.read_bytes()

    def full(path, text):
        path.with_name(f".{path.name}.tmp").write_text(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html_report, "replace_file", full)
    with pytest.raises(UserError, match=r"report\.html cannot be written: No space left"):
        write_report([run])
    assert file.read_bytes() == earlier


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "RUN"),
        (["/nowhere"], "there is no run folder /nowhere"),
        (["{empty}"], "is no run folder: it has no recipe.yaml"),
        (["{run}", "--output", "/nowhere/report.html"], "/nowhere/report.html cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(run, tmp_path, capsys, arguments, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as leaving:
        main(["report", *(argument.format(run=run, empty=tmp_path / "empty") for argument in arguments)])
    complaint = capsys.readouterr().err
    assert leaving.value.code == 2
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert says in complaint
    assert not (run / "report.html").exists()


def test_the_command_says_where_the_report_is(run, tmp_path, capsys):
    for extra, where in (([], run / "report.html"), (["--output", str(tmp_path / "two.html")], tmp_path / "two.html")):
        with pytest.raises(SystemExit) as leaving:
            main(["report", str(run), *extra])
        assert not leaving.value.code
        assert str(where) in capsys.readouterr().out
        assert where.read_text().startswith("<!DOCTYPE html>")
