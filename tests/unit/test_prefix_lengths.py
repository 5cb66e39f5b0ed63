"""The lengths of a conversation's beginnings against beginnings that are rendered by themselves, and what they save."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat_tokenizers import TEMPLATES, byte_chat_tokenizer

from isotune.data.sft.chat_template import ChatTemplate
from isotune.data.sft.messages import example_of
from isotune.data.sft.tokenization import ConversationEncoder

LOOKS_AHEAD = {
    "the next message": "{% for m in messages %}{{ m.content }}"
    "{% if messages[loop.index0 + 1] %},{% endif %}{% endfor %}",
    "the last one": "{% for m in messages %}{{ m.content + messages[-1].role }}{% endfor %}",
    "their number": "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}",
    "whether it is the last": "{% for m in messages %}{{ m.content if loop.last else m.content | trim }};{% endfor %}",
    "how many are left": "{% for m in messages %}{{ m.content }}{{ loop.revindex }}{% endfor %}",
    "all beforehand": "{% set n = messages | map(attribute='role') | list | length %}"
    "{% for m in messages %}{{ m.content }}{{ n }}{% endfor %}",
    "the first of a kind": "{% set q = messages | selectattr('role', 'equalto', 'tool') | first %}"
    "{% for m in messages %}{{ m.content }}{{ q.content }}{% endfor %}",
    "the end, in what follows": "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].role }}",
    "a state, in what follows": "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}"
    "{{ m.content }}{% endfor %}{{ s.n }}",
    "the prompt within": "{% for m in messages %}{{ m.content }}{{ add_generation_prompt }}{% endfor %}",
    "a list in reverse": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.role }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "until a tool": "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "only some": "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
    "a macro's loop": "{% macro all() %}{% for m in messages %}{{ m.role[0] }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ m.content }}{{ all() }}{% endfor %}",
    "an inner loop": "{% for m in messages %}{{ m.content }}"
    "{% for o in messages %}{{ o.role[0] }}{% endfor %}{% endfor %}",
    "another list": "{% set turns = messages[1:] %}{{ messages[0].content }}{% for m in turns %}"
    "{{ m.content }}{{ loop.previtem.role if not loop.first }}{% endfor %}{{ eos_token }}",
    "the one before": "{% for m in messages %}{{ m.content }}{{ messages[loop.index0 - 1].role if loop.index0 }}"
    "{% endfor %}{{ 'assistant' if add_generation_prompt else eos_token }}",
}
STEADY = {"another list", "the one before"}
TEMPLATE_TEXTS = {path.stem: path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))} | LOOKS_AHEAD
ROLES = st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=2, max_size=9)


def template_of(text: str) -> Any:
    tokenizer = byte_chat_tokenizer()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, lambda text: range(len(text) + 1))


@pytest.mark.parametrize("name", TEMPLATE_TEXTS)
@settings(max_examples=25, deadline=None)
@given(roles=ROLES)
def test_a_known_length_is_that_of_the_beginning_rendered_by_itself(name, roles):
    template = template_of(TEMPLATE_TEXTS[name])
    messages = [{"role": role, "content": f" {n} "} for n, role in enumerate(roles)]
    found = template.prefix_lengths(messages)
    if found is None:
        return
    whole, lengths = found
    assert whole == template.render(messages)
    for count in lengths:
        if not count:
            continue
        for prompt in (False, True):
            ending = template.render(messages, prompt=prompt)[lengths[len(messages)] :]
            assert template.render(messages[:count], prompt=prompt) == whole[: lengths[count]] + ending, (count, prompt)


@pytest.mark.parametrize("name", ["chatml", "chatml_generation", "phi", "gemma", "opens_thinking", *sorted(STEADY)])
def test_every_beginning_is_known_of_a_template_that_looks_at_nothing_ahead(name):
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n}"} for n in range(12)]
    found = template_of(TEMPLATE_TEXTS[name]).prefix_lengths(messages)
    assert found is not None and {*found[1]} >= {*range(1, 13)}


@pytest.mark.parametrize("name", sorted(LOOKS_AHEAD.keys() - STEADY))
def test_no_beginning_is_claimed_of_one_that_does(name):
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n}"} for n in range(12)]
    found = template_of(TEMPLATE_TEXTS[name]).prefix_lengths(messages)
    assert found is None or not {*found[1]} & {*range(1, 12)}


@pytest.mark.parametrize(
    ("family", "few"), [("chatml", True), ("llama3", True), ("phi", True), ("qwen_thinking", False)]
)
def test_many_turns_are_rendered_a_few_times_and_to_the_same_documents(monkeypatch, family, few):
    encoder = ConversationEncoder(byte_chat_tokenizer(family, merges=True))
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"{n} a"} for n in range(80)]
    rendered = 0
    original = ChatTemplate.render_with_spans

    def counted(self, messages, *more, **options):
        nonlocal rendered
        rendered += len(messages)
        return original(self, messages, *more, **options)

    monkeypatch.setattr(ChatTemplate, "render_with_spans", counted)
    found = encoder.conversations(example_of(turns))
    in_one_go, rendered = rendered, 0
    monkeypatch.setattr(ChatTemplate, "prefix_lengths", lambda *_: None)
    slow = encoder.conversations(example_of(turns))
    assert found == slow and sum(len(document.answers) for document in found) == 40
    assert rendered > 40 * 80
    assert (in_one_go <= 5 * 80) == few
