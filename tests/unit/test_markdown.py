"""A model card shows what is in a run's files, and nothing in them becomes markup or code."""

import ast
import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from isotune.report.markdown import fenced, inline, python_text
from isotune.report.model_card import write_model_card

HOSTILE = (
    'a"b\\',
    "x\n```\n# y",
    "# head\r\n\r\n# second",
    "| cell | <img src=x onerror=alert(1)> ![p](http://x.y/z) [l](javascript:1)",
    "*e* _e_ __e__ ~~s~~ `code` $m$ &lt; <b> https://x.y www.x.y @me",
    "---\nlicense: mit\n---",
    "{{ 7 * 7 }} {% raw %}",
    "\ud800 \x00 \u2028 end",
)
MARKED = {"em", "strong", "s", "code_inline", "image", "link", "html_inline", "html_block", "softbreak", "hardbreak"}


def blocks(text: str) -> list[tuple[str, str]]:
    """The headings, texts and blocks of code of a page, in order; an assertion fails where a text has markup."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    found = []
    for before, token in zip(tokens[:1] + tokens, tokens, strict=False):
        assert token.type not in MARKED
        if token.type == "inline":
            assert not MARKED & {child.type.removesuffix("_open") for child in token.children or ()}, token.content
            found.append((before.type, "".join(child.content for child in token.children or ())))
        elif token.type == "fence":
            found.append((f"fence {token.info}", token.content))
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_one_line_in_which_nothing_is_markup(text):
    ((kind, shown),) = blocks(f"Its classes: {inline(text)}.")
    flat = " ".join(re.sub(r"[\x00-\x1f]", " ", text.replace("\ud800", "\ufffd")).split())
    assert (kind, shown) == ("paragraph_open", f"Its classes: {flat}.")


@pytest.mark.parametrize("text", HOSTILE)
def test_code_ends_where_it_ends_and_a_literal_is_its_text(text):
    (block,) = blocks(fenced(text.replace("\ud800", ""), "yaml"))
    assert block[0] == "fence yaml"
    assert ast.literal_eval(python_text(text)) == text and python_text(text).isprintable()


def test_a_card_of_hostile_names_has_the_sections_and_the_code_of_any_other(tmp_path):
    for number, name in enumerate(HOSTILE[:-1]):
        run = tmp_path / str(number) / name.replace("/", "-")
        (run / "model").mkdir(parents=True)
        values = {
            "model_name_or_path": name, "dataset_name": name, "tune": name, "overlong": "head",
            "dataset_split": name, "num_labels": 2, "chat_format": name, "label_names": [name, "b"],
        }  # fmt: skip
        (run / "recipe.yaml").write_text(yaml.safe_dump(values))
        (run / "environment.json").write_text(
            json.dumps({"versions": {"torch": name, "isotune": name}, "device": name})
        )
        for repository in (None, "someone/tiny"):
            card = write_model_card(run, repository).read_text()
            ((front, text),) = re.findall(r"\A---\n(.*?)\n---\n(.*)", card, re.DOTALL)
            assert yaml.safe_load(front)["model_name"] == ("tiny" if repository else run.name)
            assert "license" not in yaml.safe_load(front)
            found = blocks(text)
            headings = [shown for kind, shown in found if kind == "heading_open"]
            assert headings[1:] == ["Load it", "Results", "Data", "Training", "Recipe"]
            code, recipe = (shown for kind, shown in found if kind.startswith("fence"))
            loads = [node.args[0] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
            assert [ast.literal_eval(each) for each in loads] == [repository or str(run / "model")] * 2
            assert yaml.safe_load(recipe)["label_names"] == [name, "b"]
