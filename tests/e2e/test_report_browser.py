"""The report of a real run in a real browser: it fits phone and desk, loads nothing, and passes an audit."""

import json

import matplotlib.image
import pytest
from axe_playwright_python.sync_playwright import Axe
from tests.browser import DESK, PHONE, opened, started_browser
from tests.building import build
from tests.unit.test_report import HOSTILE, PNG, classify, generate, write_run

from isotune.report.html_report import write_report

SIZES = [(PHONE, False), (DESK, True)]
SIZES += [pytest.param(PHONE, True, marks=pytest.mark.slow), pytest.param(DESK, False, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def browser():
    with started_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of two runs with pictures, errors and texts of every kind."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(folder / "one", steps=40)
    generate(one, ["Yes.", HOSTILE, "one" * 300], prompt="A longer question, " * 12)
    where = classify(one, 40)
    (where / "confusion_matrix.png").write_bytes(PNG)
    (where / "confusion_matrix.txt").write_text("Of 60 rows 40 are right.\nbad: 20 of 30\n")
    other = write_run(folder / ("a_long_name_of_a_run" * 6), learning_rate=0.5)
    classify(other, 58)
    generate(other, ["No.", "Yes.", "Yes."], prompt="A longer question, " * 12)
    return write_report([one, other], folder / "report.html")


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_it_fits_the_window_says_nothing_in_the_console_and_requests_nothing(browser, report, width, dark):
    with opened(browser, report, width, dark=dark) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        assert seen.requested == [report.resolve().as_uri()]
        assert seen.said == []


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_an_accessibility_audit_finds_nothing(browser, report, width, dark):
    with opened(browser, report, width, dark=dark) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        # the audit's script comes from its package through the debugger, which the page's own policy does not bind
        found = Axe().run(seen.page)
        broken = [(each["id"], [node["html"] for node in each["nodes"][:3]]) for each in found.response["violations"]]
        assert broken == []
        assert len(found.response["passes"]) > 20


def test_every_picture_and_chart_has_an_alternative(browser, report):
    with opened(browser, report) as seen:
        pictures = seen.page.locator("img")
        assert [each.get_attribute("alt") for each in pictures.all()] == ["Of 60 rows 40 are right."]
        assert seen.page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
        charts = seen.page.get_by_role("img", name="Loss by step")
        assert charts.count() == 1


def test_it_is_read_by_keyboard_alone(browser, report):
    with opened(browser, report) as seen:
        seen.page.keyboard.press("Tab")
        assert seen.page.evaluate("document.activeElement.className") == "skip"
        assert seen.page.locator(".skip").bounding_box()["x"] >= 0
        seen.page.keyboard.press("Enter")
        assert seen.page.evaluate("document.activeElement.id") == "content"
        folded = seen.page.locator("details:not([open])")
        before = folded.count()
        folded.first.locator("summary").focus()
        seen.page.keyboard.press("Enter")
        assert folded.count() == before - 1


def test_a_script_in_the_data_does_not_run(browser, report):
    with opened(browser, report) as seen:
        alerts = []
        seen.page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        seen.page.reload()
        assert alerts == []
        assert seen.page.locator("script").count() == 0
        assert "<script>alert(1)</script>" in seen.page.inner_text("body")


def test_light_and_dark_are_different_and_print_is_light(browser, report, tmp_path):
    brightness = {}
    for name, dark, medium in (("light", False, "screen"), ("dark", True, "screen"), ("print", True, "print")):
        with opened(browser, report, dark=dark) as seen:
            seen.page.emulate_media(media=medium)
            seen.page.screenshot(path=tmp_path / f"{name}.png")
        brightness[name] = float(matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3].mean())
    assert brightness["light"] > 0.85 and brightness["print"] > 0.85
    assert brightness["dark"] < 0.25


def test_what_is_folded_on_the_screen_is_printed(browser, report):
    with opened(browser, report) as seen:
        seen.page.emulate_media(media="print")
        heights = seen.page.evaluate("[...document.querySelectorAll('details table')].map(t => t.offsetHeight)")
        assert heights and min(heights) > 10


def test_a_run_that_was_really_trained_is_told_as_it_was(browser, tmp_path):
    built = build(tmp_path, eval_dataset_name="builtin:greetings", eval_strategy="steps", eval_steps=3)
    last = built.train()[-1]
    environment = json.loads((built.run.path / "environment.json").read_text())
    counts = environment["data"]["train"]
    assert counts["read"] == counts["kept"] > 0
    with opened(browser, write_report([built.run.path])) as seen:
        text = seen.page.locator("body").text_content()
        for expected in (f"{counts['read']:,}", environment["versions"]["torch"], f"{last['eval_loss']:.4f}"):
            assert expected in text
        assert seen.page.get_by_role("img", name="Loss by step").count() == 1
        assert seen.said == []
