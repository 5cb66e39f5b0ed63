"""Which form conversations are written in: Guanaco's, or a chat template's; either is a template that is saved.

    auto       the tokenizer's own chat template where it has one, else Guanaco's form
    guanaco    ### Human: ... ### Assistant: ...
    template   the tokenizer's own chat template
    FILE       the Jinja template in that file

RUN/model carries the template of training, so whoever serves the model asks it as it was trained. Guanaco's form is
written as a template too, and known by its first line.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from transformers.utils import chat_template_utils

from isotune.compat.chat_templates import RENDERING_ERRORS, bounded_environment
from isotune.data.sft.prefixes import bounded_rendering
from isotune.data.tokenizer import prefix_of, tokenizer_name
from isotune.io.errors import UserError, first_line, nearest
from isotune.io.folders import expanded
from isotune.io.reading import Unreadable, read_text

AUTO, GUANACO, TEMPLATE = WORDS = ("auto", "guanaco", "template")
GUANACO_MARK = "{#- isotune: Guanaco's form -#}"
# What `strftime_now` writes while the data are prepared, and in RUN/model: a template that asks for the date would
# give other documents every day. It is the day that Llama's templates fall back to.
DAY = "2024-07-26"
# all parts of `strftime`, as English writes them at midnight of that day
_DAY_PARTS = {
    "a": "Fri", "A": "Friday", "b": "Jul", "B": "July", "c": "Fri Jul 26 00:00:00 2024", "C": "20", "d": "26",
    "D": "07/26/24", "e": "26", "f": "000000", "F": DAY, "g": "24", "G": "2024", "h": "Jul", "H": "00", "I": "12",
    "j": "208", "k": " 0", "l": "12", "m": "07", "M": "00", "n": "\n", "p": "AM", "P": "am", "r": "12:00:00 AM",
    "R": "00:00", "S": "00", "t": "\t", "T": "00:00:00", "u": "5", "U": "29", "V": "30", "w": "5", "W": "30",
    "x": "07/26/24", "X": "00:00:00", "y": "24", "Y": "2024", "z": "", "Z": "", "%": "%",
}  # fmt: skip
_PART = re.compile("%(-?)(.?)", re.S)  # with a hyphen, a number is without zeros in front
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")

_GUANACO_BODY = """
{%- set headers = {'system': '### System: ', 'user': '### Human: ', 'assistant': '### Assistant: ',
    'tool': '### Tool: '} -%}
{%- macro list_tools() -%}
    {{- '### Tools: ' -}}
    {%- for tool in tools -%}{{- ('' if loop.first else '\\n') + (tool | tojson) -}}{%- endfor -%}
{%- endmacro -%}
{%- if tools and messages[0].role != 'system' -%}{{- list_tools() + '\\n' -}}{%- endif -%}
{%- for message in messages -%}
    {%- set body = namespace(text='') -%}
    {%- if message.content is string -%}
        {%- set body.text = message.content -%}
    {%- elif message.content -%}
        {%- for part in message.content -%}{%- set body.text = body.text + part.text -%}{%- endfor -%}
    {%- endif -%}
    {%- if message.reasoning_content -%}
        {%- set body.text = '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' + body.text -%}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {%- set function = call.function or call -%}
        {%- set given = function.arguments if function.arguments is string else function.arguments | tojson -%}
        {%- set body.text = body.text + ('\\n' if body.text else '') + '<tool_call>\\n{"name": '
            + (function.name | tojson) + ', "arguments": ' + given + '}\\n</tool_call>' -%}
    {%- endfor -%}
    {%- if loop.last and not add_generation_prompt and message.role == 'assistant' -%}
        {%- set body.text = body.text.rstrip() -%}
    {%- endif -%}
    {{- ('' if loop.first else '\\n') + headers[message.role] + body.text -}}
    {%- if loop.first and tools and message.role == 'system' -%}{{- '\\n' + list_tools() -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n### Assistant:' -}}
{%- elif messages[-1].role == 'assistant' -%}
    {{- eos_token -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatFormat:
    """A form of conversations, as its Jinja template."""

    kind: Literal["guanaco", "template"]
    template: str | dict[str, str] | None  # None is Guanaco's, whose template depends on the tokenizer
    source: str  # where the template comes from, as a line of the program names it

    @classmethod
    def of(cls, asked: str, tokenizer: Any) -> "ChatFormat":
        """The form that `chat_format` asks for; UserError where there is none."""
        own = getattr(tokenizer, "chat_template", None)
        is_guanaco = isinstance(own, str) and own.startswith(GUANACO_MARK)
        if asked == GUANACO or (asked == AUTO and (is_guanaco or not own)):
            return cls(GUANACO, None, "### Human: ... ### Assistant: ...")
        if asked in (AUTO, TEMPLATE):
            if not own:
                raise UserError(
                    f"chat_format is template, and the tokenizer {tokenizer_name(tokenizer)} has no chat template: "
                    "say guanaco, or name a file that holds one"
                )
            if is_guanaco:
                return cls(GUANACO, None, "### Human: ... ### Assistant: ...")
            return cls(TEMPLATE, _checked(own, f"the chat template of {tokenizer_name(tokenizer)}"), "the tokenizer's")
        return cls._of_file(asked)

    @classmethod
    def _of_file(cls, asked: str) -> "ChatFormat":
        path = expanded(asked)
        try:
            text = read_text(path)
        except (FileNotFoundError, Unreadable) as error:
            near = nearest(asked, WORDS)
            hint = f"did you mean {near}?" if near else "it takes auto, guanaco, template, or a file"
            raise UserError(f"chat_format: {asked!r} cannot be read ({first_line(error)}): {hint}") from error
        if text.startswith(GUANACO_MARK):
            return cls(GUANACO, None, f"of {path}")
        return cls(TEMPLATE, _checked(text, str(path)), f"of {path}")

    def apply(self, tokenizer: Any) -> None:
        """Let a tokenizer carry the template of this form, so that everything saved with it says how it was trained."""
        tokenizer.chat_template = guanaco_template(tokenizer) if self.template is None else self.template

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for the day, which is always `DAY`."""
        texts = self.template.values() if isinstance(self.template, dict) else [self.template or ""]
        return any("strftime_now" in text for text in texts)

    def __str__(self) -> str:
        return f"{self.kind}, {self.source}" + (f"; the date that it writes is {DAY}" if self.writes_date else "")


def guanaco_template(tokenizer: Any) -> str:
    """Guanaco's form as a Jinja template that makes, by `apply_chat_template`, the tokens that training saw.

    That function adds no special tokens, so the template writes those that the tokenizer puts before a text.
    """
    before = "".join(tokenizer.convert_ids_to_tokens(prefix_of(tokenizer)))
    first = f"{{{{- {before!r} -}}}}" if before else ""
    return GUANACO_MARK + "\n" + first + _GUANACO_BODY


def _checked(template: str | dict[str, str], where: str) -> str | dict[str, str]:
    """The template with the day fixed; UserError where it is no template."""
    if isinstance(template, dict):
        return {name: str(_checked(text, where)) for name, text in template.items()}
    try:
        with bounded_rendering():
            cast(Any, chat_template_utils).render_jinja_template(
                [[{"role": "user", "content": "a"}]], chat_template=template
            )
    except TemplateSyntaxError as error:
        raise UserError(f"{where} is not a Jinja template: line {error.lineno}: {first_line(error)}") from error
    except SyntaxError as error:  # of a `break` outside a loop, say, which Jinja hands on to Python
        raise UserError(f"{where} is not a Jinja template: {first_line(error)}") from error
    except RENDERING_ERRORS:
        pass  # what it thinks of a message is said when there is one
    return _with_fixed_day(template, where)


def _with_fixed_day(template: str, where: str) -> str:
    """A template whose calls of `strftime_now` all write `DAY`, in the form that each asks for.

    UserError where a form is not known before the template is used, or `strftime` does not know a part of it.
    """
    if "strftime_now" not in template or "macro strftime_now" in template:
        return template
    try:
        known = _date_forms(bounded_environment().parse(template), where)
    except RENDERING_ERRORS:
        return template  # it is broken, which is said when there is a message
    in_order = [one or other for one, other in _DATE_CALL.findall(template)]
    forms = dict.fromkeys([*(form for form in in_order if form in known), *known])
    choices = "".join(
        f"{{%- if format == {form!r} -%}}{_literal(_day_in(form, where))}{{%- endif -%}}" for form in forms
    )
    return f"{{%- macro strftime_now(format) -%}}{choices}{{%- endmacro -%}}\n" + template


def _date_forms(tree: nodes.Template, where: str) -> list[str]:
    """The forms that a template's calls of `strftime_now` ask for; UserError where one is not written out."""
    forms: list[str] = []
    asked: set[int] = set()  # names that are called, or of which is only asked whether they are there
    for node in tree.find_all((nodes.Call, nodes.Test, nodes.If, nodes.CondExpr, nodes.And, nodes.Or, nodes.Not)):
        if isinstance(node, nodes.If | nodes.CondExpr):
            asked.add(id(node.test))
        elif not isinstance(node, nodes.Call):
            asked.update(id(child) for child in node.iter_child_nodes())
        elif isinstance(node.node, nodes.Name) and node.node.name == "strftime_now":
            given = [*node.args, *(each.value for each in node.kwargs if each.key == "format")]
            form = given[0].value if len(given) == 1 and isinstance(given[0], nodes.Const) else None
            if isinstance(form, str):
                asked.add(id(node.node))
                forms.append(form)
    names = (name for name in tree.find_all(nodes.Name) if name.name == "strftime_now" and name.ctx == "load")
    if unclear := next((name for name in names if id(name) not in asked), None):
        raise UserError(
            f"{where}, line {unclear.lineno}: strftime_now is used without a form that is written out, such as "
            f'"%d %b %Y": the day in training and in RUN/model is always {DAY}'
        )
    return forms


def _day_in(form: str, where: str) -> str:
    """`DAY` in a form of `strftime`."""

    def written(part: re.Match[str]) -> str:
        own = _DAY_PARTS.get(part[2])
        if own is None or (part[1] and not own.strip().isdigit()):
            raise UserError(f"{where}: strftime_now is asked for {form!r}, and {part[0]} is no part of a date")
        return (own.lstrip("0 ") or "0") if part[1] else own

    return _PART.sub(written, form)


def _literal(text: str) -> str:
    """A text as a template writes it, whatever stands around it."""
    return text if text == text.strip() and "{" not in text else f"{{{{- {text!r} -}}}}"
