"""The pages of `isotune serve` in a real browser: by keyboard, on a phone, without a request elsewhere, audited."""

import re
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from tests.browser import DESK, PHONE, opened, started_browser
from tests.serving import classifier_run, generator_run, predictions_of, served

from isotune.evaluation.generation.chat import answer
from isotune.evaluation.generation.completion import Decoding
from isotune.evaluation.models import generation_model_of_run

SIZES = [(PHONE, False), (DESK, True)]
SIZES += [pytest.param(PHONE, True, marks=pytest.mark.slow), pytest.param(DESK, False, marks=pytest.mark.slow)]
TEXT = "I came across a film in 1999. To me the film was simply brilliant."
QUESTION = "Greet Ada in German."


@pytest.fixture(scope="module")
def browser():
    with started_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def classifier_folder(browser, tmp_path_factory):
    return classifier_run(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def classifier(classifier_folder):
    with served(classifier_folder) as server:
        yield server


@pytest.fixture(scope="module")
def generator(browser, tmp_path_factory):
    run = generator_run(tmp_path_factory.mktemp("generator"))
    with served(run) as server:
        yield server, run


def check_page(seen, url, width):
    """It fits the window, asks this server alone, says nothing in the console, and an audit finds nothing."""
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.requested and all(address.startswith((f"{url}/", "data:")) for address in seen.requested)
    assert seen.said == []
    found = Axe().run(seen.page)
    assert [(each["id"], [node["html"] for node in each["nodes"][:3]]) for each in found.response["violations"]] == []
    assert len(found.response["passes"]) > 15


def wait_until(seen, expression, seconds=30):
    """Wait until an expression of JavaScript is true: playwright's own way is not allowed by the page's policy."""
    ends = time.monotonic() + seconds
    while not seen.page.evaluate(expression):
        assert time.monotonic() < ends, f"{expression}: {seen.page.inner_text('body')}"
        seen.page.wait_for_timeout(20)


def type_text(seen, text=TEXT):
    """Type into what has the focus, as a person does: the page's first field has it."""
    seen.page.keyboard.type(text)
    seen.page.wait_for_selector("#bars .share:not(:empty)")


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_the_classifier_s_page_fits_is_accessible_and_asks_this_server_alone(browser, classifier, width, dark):
    with opened(browser, classifier.url, width, dark=dark) as seen:
        type_text(seen)
        seen.page.get_by_role("button", name="Show which words decide").click()
        seen.page.wait_for_selector("#words .word")
        seen.page.locator("summary").click()
        seen.page.get_by_role("button", name="Show similar errors").click()
        seen.page.wait_for_selector("#errors li")
        check_page(seen, classifier.url, width)


def test_probabilities_follow_what_is_typed_and_are_those_of_the_server(browser, classifier):
    with opened(browser, classifier.url) as seen:
        assert seen.page.locator("#bars li").count() == 0
        for text in ("To me", " the film was painfully dull."):
            typed = seen.page.locator("#text").input_value() + text
            with seen.page.expect_response(lambda found: found.request.post_data_json == {"text": typed}):  # noqa: B023
                seen.page.keyboard.type(text)
            (prediction,) = classifier.post("/predict", {"text": typed}).json()["predictions"]
            shown = [f"{100 * share:.1f}%" for share in prediction["probabilities"].values()]
            shares = "[...document.querySelectorAll('#bars .share')].map(e => e.textContent).join()"
            wait_until(seen, f"{shares} === '{','.join(shown)}'")
            widths = seen.page.evaluate("[...document.querySelectorAll('#bars .fill')].map(e => e.style.width)")
            assert widths == shown
            best = seen.page.locator("#bars .first .name")
            assert best.all_text_contents() == [prediction["label"]]
        wait_until(seen, "document.getElementById('said').textContent.startsWith('Predicted ')")
        seen.page.locator("#text").fill("")
        wait_until(seen, "document.querySelectorAll('#bars li').length === 0")
        assert seen.page.get_by_role("button", name="Show which words decide").is_disabled()


def test_the_classifier_s_page_works_by_keyboard_alone(browser, classifier):
    with opened(browser, classifier.url) as seen:
        assert seen.page.evaluate("document.activeElement.id") == "text"
        type_text(seen)
        seen.page.wait_for_selector("#explain:not([disabled])")
        seen.page.keyboard.press("Tab")
        assert seen.page.evaluate("document.activeElement.id") == "explain"
        seen.page.keyboard.press("Enter")
        wait_until(seen, "document.activeElement.id === 'words-title'")
        words = seen.page.locator("#words .word").all_text_contents()
        assert " ".join(words).lower().startswith("i came across a film")
        assert "integrated gradients" in seen.page.inner_text("#method")
        seen.page.locator("#explain").focus()
        seen.page.keyboard.press("Tab")
        seen.page.keyboard.press("Enter")
        wait_until(seen, "document.activeElement.id === 'errors-title'")
        assert seen.page.locator("#errors li").count() == 5
        assert re.match(r"is \d, was predicted \d \(", seen.page.locator("#errors li .soft").first.inner_text())
        assert "identical" in seen.page.inner_text("#facts")


def test_an_answer_about_a_text_that_has_changed_since_is_not_shown(browser, classifier):
    with opened(browser, classifier.url) as seen:
        type_text(seen)
        seen.page.evaluate("""() => {
          const stock = window.fetch;
          window.answered = [];
          window.fetch = async (path, ...more) => {
            const answer = await stock(path, ...more);
            if (path === "attributions" || path === "similar") {
              const field = document.getElementById("text");
              field.value += " More.";
              field.dispatchEvent(new Event("input"));
              window.answered.push(path);
            }
            return answer;
          };
        }""")
        for button, path in (("Show which words decide", "attributions"), ("Show similar errors", "similar")):
            seen.page.get_by_role("button", name=button).click()
            wait_until(seen, f"window.answered.includes('{path}') && !document.getElementById('explain').disabled")
        assert not seen.page.locator("#words-section").is_visible()
        assert not seen.page.locator("#errors-section").is_visible() and seen.said == []


def test_a_text_with_markup_is_shown_as_text(browser, classifier):
    with opened(browser, classifier.url) as seen:
        type_text(seen, "<img src=x onerror=alert(1)> brilliant")
        seen.page.get_by_role("button", name="Show which words decide").click()
        seen.page.wait_for_selector("#words .word")
        assert seen.page.locator("main img").count() == 0 and seen.said == []


def test_a_server_that_has_gone_is_said(browser, classifier_folder):
    with served(classifier_folder, "--no_replay") as server, opened(browser, server.url) as seen:
        type_text(seen)
        assert server.stop() == 0
        seen.page.keyboard.type("!")
        wait_until(seen, "document.getElementById('error').textContent === 'the server does not answer'")


def send(seen, question=QUESTION):
    """Ask by keyboard, and wait until the answer has ended."""
    seen.page.keyboard.type(question)
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_selector("#send:not([disabled])")


def choose(seen, name, value):
    """Set one of the settings of answers."""
    seen.page.locator("summary").click()
    seen.page.locator(f"#{name}").fill(value)


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_the_chat_fits_is_accessible_and_asks_this_server_alone(browser, generator, width, dark):
    server, _ = generator
    with opened(browser, server.url, width, dark=dark) as seen:
        seen.page.locator("summary").click()
        seen.page.locator("#question").focus()
        send(seen)
        seen.page.locator(".assistant .said").last.evaluate("said => said.append('a'.repeat(600))")
        check_page(seen, server.url, width)


def test_a_chat_by_keyboard_has_the_answers_of_the_model_and_remembers_what_was_said(browser, generator):
    server, run = generator
    lm = generation_model_of_run(run)
    with opened(browser, server.url) as seen:
        assert seen.page.evaluate("document.activeElement.id") == "question"
        history = []
        for question in (QUESTION, "And at night?"):
            send(seen, question)
            history.append({"role": "user", "content": question})
            expected = answer(lm, history, Decoding(max_new_tokens=256))
            history.append({"role": "assistant", "content": expected})
            assert seen.page.locator(".assistant .said").all_text_contents()[-1] == expected
        assert seen.page.locator(".user .said").all_text_contents() == [QUESTION, "And at night?"]
        assert "Guanaco's form" in seen.page.inner_text("#facts") and "identical" in seen.page.inner_text("#facts")
        assert seen.page.evaluate("document.activeElement.id") == "question"
        seen.page.get_by_role("button", name="New conversation").click()
        assert seen.page.locator("#log > div").count() == 0


def test_an_answer_appears_while_it_grows_and_escape_stops_it(browser, generator):
    server, _ = generator
    with opened(browser, server.url) as seen:
        choose(seen, "temperature", "2")
        seen.page.evaluate("""() => {
          window.seen = [];
          new MutationObserver(() => window.seen.push(document.querySelector('.assistant .said')?.textContent.length))
            .observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true});
        }""")
        seen.page.locator("#question").focus()
        seen.page.keyboard.type("Greet " * 20)
        seen.page.keyboard.press("Enter")
        wait_until(seen, "window.seen.some(length => length > 0)")
        seen.page.keyboard.press("Escape")
        seen.page.wait_for_selector("#send:not([disabled])")
        lengths = [length for length in seen.page.evaluate("window.seen") if length]
        assert len(set(lengths)) >= 1 and seen.page.inner_text("#error") == ""
        assert seen.page.locator(".assistant .said").count() == 1


def test_a_conversation_longer_than_the_model_goes_on_without_its_oldest_messages(browser, generator):
    server, _ = generator
    with opened(browser, server.url) as seen:
        choose(seen, "max-tokens", "2")
        for _ in range(5):
            seen.page.locator("#question").fill("Greet Ada and Ben and Cleo. " * 20)
            seen.page.keyboard.press("Enter")
            seen.page.wait_for_selector("#send:not([disabled])")
        assert seen.page.locator("#error").inner_text() == ""
        assert seen.page.locator(".left-out").count() >= 2
        assert "oldest messages no longer fit" in seen.page.inner_text("#facts")


def test_the_evaluation_s_questions_have_their_stored_answers_on_the_page(browser, generator):
    server, run = generator
    line = predictions_of(run)[0]
    with opened(browser, server.url) as seen:
        seen.page.locator("summary").click()
        seen.page.locator("#max-tokens").fill("12")
        seen.page.locator("#question").focus()
        send(seen, line["prompt"])
        assert seen.page.locator(".assistant .said").all_text_contents() == [line["text"]]
