"""Which form a recipe's chat_format means, and what the saved tokenizer says of it."""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.building import build, small_opt
from tests.chat_tokenizers import TEMPLATES, byte_chat_tokenizer
from transformers import AutoTokenizer, pipeline
from transformers.pipelines.text_generation import Chat
from transformers.utils import chat_template_utils

from isotune.compat import chat_templates
from isotune.config import Recipe
from isotune.data.sft.chat_format import DAY, GUANACO_MARK, ChatFormat
from isotune.data.sft.messages import exchange
from isotune.data.sft.prefixes import prefix_lengths
from isotune.data.sft.preparation import prepare_conversations
from isotune.data.sft.shown_example import ShownExample
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.completion import Decoding, Prompt, complete
from isotune.evaluation.models import generation_model_of_run
from isotune.io.errors import UserError
from isotune.training.from_recipe import save

CHATML = TEMPLATES / "chatml.jinja"


@pytest.mark.parametrize(
    ("asked", "template", "kind"),
    [
        ("auto", None, "guanaco"),
        ("auto", "chatml", "template"),
        ("guanaco", "chatml", "guanaco"),
        ("template", "chatml", "template"),
        (str(CHATML), None, "template"),
        (str(CHATML), "llama3", "template"),
    ],
)
def test_the_form_is_what_was_asked_and_the_saved_tokenizer_knows_it_again(tmp_path, asked, template, kind):
    tokenizer = byte_chat_tokenizer(template)
    trained = ConversationEncoder(tokenizer, asked)
    assert trained.format.kind == kind
    trained.format.apply(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template.startswith(GUANACO_MARK) == (kind == "guanaco")
    if asked == str(CHATML):
        assert saved.chat_template == CHATML.read_text()
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    again = ConversationEncoder(saved)
    asked_by_server = saved.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (
        again.prompt_tokens(again.prompt(messages))
        == asked_by_server
        == trained.prompt_tokens(trained.prompt(messages))
    )
    assert (again.format.kind, again.end_ids) == (kind, trained.end_ids)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("template", "chat_format is template, and the tokenizer .* has no chat template: say guanaco"),
        ("guanacco", "chat_format: 'guanacco' cannot be read .* did you mean guanaco"),
        ("/nowhere/form.jinja", "it takes auto, guanaco, template, or a file"),
    ],
)
def test_a_form_that_is_not_there_is_named(asked, sentence):
    with pytest.raises(UserError, match=sentence):
        ChatFormat.of(asked, byte_chat_tokenizer())


def test_a_file_that_is_no_template_is_named_with_its_line(tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("{{ bos_token }}\n{% for message in %}")
    with pytest.raises(UserError, match=r"broken\.jinja is not a Jinja template: line 2"):
        ChatFormat.of(str(file), byte_chat_tokenizer())


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "<eos>"), ("gemma", "<end_of_turn>"),
        ("phi", "<|end|>"), ("qwen_thinking", "<|im_end|>"), (None, None),
    ],
)  # fmt: skip
def test_generation_ends_where_the_template_ends_an_answer(template, end):
    tokenizer = byte_chat_tokenizer(template)
    assert ConversationEncoder(tokenizer).end_ids == ({tokenizer.convert_tokens_to_ids(end)} if end else set())


def test_the_day_is_the_same_every_day_and_in_the_saved_template():
    tokenizer = byte_chat_tokenizer("llama3")
    form = ChatFormat.of("auto", tokenizer)
    assert str(form).endswith(DAY)
    form.apply(tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    assert "Today is 26 Jul 2024" in text
    assert ChatFormat.of("auto", tokenizer).template == form.template, "what is saved is not fixed twice"


def day_as_written(template: str) -> str:
    """What a template writes of the day, which is also what it writes once it is saved."""
    tokenizer = byte_chat_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{% endfor %}" + template
    form = ChatFormat.of("template", tokenizer)
    form.apply(tokenizer)
    assert ChatFormat.of("template", tokenizer).template == form.template
    return tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)


PARTS = [f"%{part}" for part in "aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ%"] + [f"%-{part}" for part in "dmHIMSjyeUWVkl"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_date_is_that_of_the_fixed_day(part):
    expected = datetime.fromisoformat(DAY).strftime(f"<{part}>")
    assert day_as_written(f"{{{{ '<' + strftime_now('{part}') + '>' }}}}") == expected


@pytest.mark.parametrize(
    ("template", "day"),
    [
        ("{{ strftime_now('%-d %B %Y') }}", "26 July 2024"),
        ('{{ strftime_now("%d/%m/%Y %H:%M") }}', "26/07/2024 00:00"),
        ("{{ '<' + strftime_now(' %d\n') + '>' }}", "< 26\n>"),
        ("{{ strftime_now('{%d}{{%m}}') }}", "{26}{{07}}"),
        ("{{ strftime_now(format='%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now('%d') ~ strftime_now('%f') }}", "26000000"),
        ("{% if strftime_now is defined and not x %}{{ strftime_now('%A') }}{% endif %}", "Friday"),
        ("{% if strftime_now %}{{ strftime_now('%p') if strftime_now else 1 }}{% endif %}", "AM"),
    ],
)
def test_the_day_is_written_in_whatever_form_a_template_asks_for(template, day):
    assert day_as_written(template) == day


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ strftime_now('%d %Q') }}", r"of .*: strftime_now is asked for '%d %Q', and %Q is no part of a date"),
        ("{{ strftime_now('%-B') }}", "and %-B is no part of a date"),
        ("{{ strftime_now('100%') }}", "and % is no part of a date"),
        ("{% set f = '%d %b' %}\n{{ strftime_now(f) }}", "line 2: strftime_now is used without a form that is written"),
        ("{{ strftime_now('%d' ~ x) }}", "line 1: strftime_now is used without a form"),
        ("{% set now = strftime_now %}{{ now('%d') }}", "line 1: strftime_now is used without a form"),
    ],
)
def test_a_day_that_cannot_be_fixed_is_refused(template, says):
    with pytest.raises(UserError, match=says):
        day_as_written(template)


def test_guanacos_form_has_the_fingerprint_of_earlier_versions_and_stays_out_of_the_recipes():
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    plain = Recipe.from_values(**values, chat_format="guanaco")
    assert "chat_format" not in plain.result_values() and plain.resolved()["chat_format"] == "guanaco"
    assert Recipe.from_values(**values, chat_format="template").fingerprint() != plain.fingerprint()


def test_what_a_completion_answers_is_without_reasoning_and_without_another_turn():
    guanaco, chatml = (ConversationEncoder(byte_chat_tokenizer(template)) for template in (None, "chatml"))
    asked = "<|im_start|>assistant\n"
    assert guanaco.answer_in(" Yes.\n### Human: And?", "### Assistant:") == "Yes."
    said = "<think>\nhm\n</think>\n\nYes. ### Human: no header here"
    assert chatml.answer_in(said, asked) == "Yes. ### Human: no header here"
    assert chatml.answer_in("hm\n</think>\n\nYes.", f"{asked}<think>\n") == "Yes."
    assert chatml.answer_in("It ends by </think>.", asked) == "It ends by </think>."


def test_a_template_reaches_nothing_beside_what_it_is_given():
    tokenizer = byte_chat_tokenizer("chatml")
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template += "{{ messages.__class__.__base__.__subclasses__() | length }}"
    with pytest.raises((ValueError, UserError), match=r"'__class__' .* is unsafe"):
        ConversationEncoder(tokenizer).prompt([{"role": "user", "content": "q"}])


_GROWS = (
    "{{% set n = namespace(s={first}) %}}{{% for i in range(60) %}}{{% set n.s = {then} %}}{{% endfor %}}{{{{ n.s }}}}"
)
_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": _LOOPS,
    "loops that leave all out": _LOOPS.replace("b in range(99999)", "b in range(99999) if false"),
    "a counter of its own": "{% macro isotune_spend() %}{% endmacro %}" + _LOOPS,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "many times": "{{ 'x' * 10 ** 10 }}",
    "times many": "{{ 10000000000 * 'x' }}",
    "a list many times": "{{ ([0] * 10 ** 9) | length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "twice by +": _GROWS.format(first="'xxxx'", then="n.s + n.s"),
    "twice by ~": _GROWS.format(first="'xxxx'", then="n.s ~ n.s"),
    "lists of lists": _GROWS.format(first="[1]", then="[n.s, n.s]"),
    "mappings of mappings": _GROWS.format(first="{}", then="dict(a=n.s, b=n.s)"),
    "replace": _GROWS.format(first="'xxxx'", then="n.s.replace('x', n.s)"),
    "the filter replace": _GROWS.format(first="'xxxx'", then="n.s | replace('x', n.s)"),
    "join": _GROWS.format(first="'xxxx'", then="n.s | join(n.s)"),
    "a width": "{{ 'x' | center(10 ** 10) }}{{ 'x'.ljust(10000000000) }}",
    "a format's width": "{{ '%10000000000d' % 1 }}",
    "another format's width": "{{ '{:10000000000}'.format(1) }}",
    "a width that is given": "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
    "an indent": "{{ range(99999) | list | tojson(indent=9999) }}",
    "words": "{{ lipsum(n=1000000000) }}",
}  # fmt: skip
REFUSES = {
    "a division by zero": "{{ 1 // 0 }}",
    "a long range": "{{ range(200000) }}",
    "a loop without an end": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
QUESTION = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_one_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setattr(chat_templates, "MAX_UNITS", 20_000)
    tokenizer = byte_chat_tokenizer()
    for template in (ENDLESS[name], "{% if messages | length > 1 %}" + ENDLESS[name] + "{% endif %}"):
        (tmp_path / "own.jinja").write_text(template)
        with pytest.raises(UserError, match="chat template goes on without end: for one conversation it may take"):
            encoder = ConversationEncoder(tokenizer, str(tmp_path / "own.jinja"))
            encoder.prompt([*QUESTION, {"role": "assistant", "content": "a"}, *QUESTION])


@pytest.mark.parametrize("name", REFUSES)
def test_a_template_that_fails_refuses_the_messages(name, tmp_path):
    (tmp_path / "own.jinja").write_text(REFUSES[name] + "{% for m in messages %}{{ m.content }}{% endfor %}")
    encoder = ConversationEncoder(byte_chat_tokenizer(), str(tmp_path / "own.jinja"))
    with pytest.raises(ValueError, match="the chat template refuses it: "):
        encoder.prompt(QUESTION)
    assert prefix_lengths((tmp_path / "own.jinja").read_text(), QUESTION * 9, None, {}) is None


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_a_bounded_template_writes_what_transformers_writes(name):
    template = (TEMPLATES / f"{name}.jinja").read_text()
    messages = [{"role": role, "content": f" {role} {i}\n"} for i in range(3) for role in ("user", "assistant")]
    given = {"chat_template": template, "add_generation_prompt": True, "eos_token": "</s>", "bos_token": "<s>"}
    given["return_assistant_tokens_mask"] = "{% generation %}" in template
    stock = chat_template_utils.render_jinja_template([messages], **given)
    for _ in range(2):
        with chat_templates.bounded():
            assert chat_template_utils.render_jinja_template([messages], **given) == stock
    assert chat_template_utils.render_jinja_template([messages], **given) == stock


def test_one_example_is_shown_with_what_is_learnt_in_brackets_or_in_colour():
    tokenizer = byte_chat_tokenizer("chatml")
    encoder = ConversationEncoder(tokenizer)
    shown = ShownExample.of(encoder.encode(encoder.conversations(exchange("q", "a"))), 0, tokenizer)
    before = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert shown.text(colour=False) == f"{before}[a<|im_end|>\n]"
    assert shown.text(colour=True) == f"{before}\x1b[32ma<|im_end|>\n\x1b[0m"
    assert shown.lines(colour=False).startswith("example     row 1;")


@pytest.mark.parametrize(("chat_format", "template"), [("template", "qwen_thinking"), (str(CHATML), "llama3")])
def test_a_run_on_a_base_with_a_template_is_asked_by_a_stock_pipeline_as_it_was_trained(
    tmp_path, chat_format, template
):
    tokenizer = byte_chat_tokenizer(template, merges=True)
    base = small_opt(tmp_path / "base", vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=1, pad_token_id=0)
    tokenizer.save_pretrained(base)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is a tide a wave?"}]
    row = {"messages": [*messages, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    data = {"model_name_or_path": base, "dataset_name": str(tmp_path / "rows.jsonl"), "chat_format": chat_format}
    built = build(tmp_path, **data, max_steps=1, global_batch_size=2)
    built.trainer.train()
    save(built.start, built.trainer)

    model = built.run.path / "model"
    saved = AutoTokenizer.from_pretrained(model)
    name = template if chat_format == "template" else "chatml"
    assert saved.chat_template == (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    stock = pipeline("text-generation", model=str(model), device="cpu")
    asked = stock.preprocess(Chat(messages))["input_ids"][0].tolist()
    trained = prepare_conversations(built.recipe, tokenizer, show=False).train.documents
    first = int(np.flatnonzero(trained.supervised)[0])
    assert trained.input_ids[:first].tolist() == asked and "Yes." in tokenizer.decode(trained.input_ids[first:])
    (said,) = stock(messages, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert said["generated_text"].strip() == answer_of_run(built.run.path, row["messages"][:2])


def answer_of_run(run: Path, messages: list[dict]) -> str:
    """The greedy answer that isotune gives, before what is no part of it is taken off."""
    lm = generation_model_of_run(run, torch.device("cpu"))
    prompt = Prompt(0, lm.encoder.prompt(messages))
    return complete(lm, [prompt], Decoding(max_new_tokens=8), batch_size=1, ranks=Ranks(0, 1, lm.device))[
        0
    ].text.strip()
