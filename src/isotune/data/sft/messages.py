"""Messages in the spellings that are found in the wild, as one: role, content, tool calls, and whether to learn them.

    {"role": "assistant", "content": "Lima.", "weight": 0}        OpenAI, Mistral
    {"from": "gpt", "value": "Lima.", "train": false}             ShareGPT, axolotl
    {"role": "assistant", "content": null, "tool_calls": [...]}   an assistant that calls a tool and says nothing

A field that means something and is not known is never passed over in silence: it is kept in the message, where a chat
template may read it, and whoever renders the message names what was not read.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from isotune.data.sources.source import is_null, kind_of_value
from isotune.io.errors import shown

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
# what stands before the first header of a text in Guanaco's form, and belongs to no turn; no role of a data set
PREAMBLE = "preamble"
ROLES = {
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "ai"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), TOOL),
    **dict.fromkeys(("tool_response", "function_response", "tool_result", "function_result"), TOOL),
}
# roles of their own in ShareGPT's form: an assistant that calls a tool; the first is also a field, OpenAI's old one
FUNCTION_CALL, TOOL_CALL = "function_call", "tool_call"
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")
TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts of a content
LEARN_FIELDS = ("weight", "train", "loss")
# other names under which somebody may have said what is learnt: each means one thing here and another there
OTHER_MARKS = re.compile(
    r"(?:(?:is|no|do|use|skip|train|loss|calculate|compute)_)*"
    r"(?:train(?:able|ing|ed)?|train_on(?:_turn)?|train_detail|learn(?:able|t|ed)?|mask(?:ed|ing)?|weights?|loss|"
    r"ignored?|supervised?)",
    re.I,
)
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # of one text; the first is what templates read
# read by every form, or names that change nothing of what is said
KNOWN_FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name", "id", *REASONING_FIELDS}

NO_TOOLS = ("", "null", "None")  # as texts

# the fields that are known in any case
_IN_ANY_CASE = {*ROLE_FIELDS, *CONTENT_FIELDS, *LEARN_FIELDS, "tool_calls", FUNCTION_CALL, "name", *REASONING_FIELDS}

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One conversation as messages, before any format: `learn` says for each message whether it may be learnt."""

    messages: tuple[Message, ...]
    learn: tuple[bool, ...]
    tools: tuple[Any, ...] | None = None  # JSON schemas of the tools that the assistant may call
    asked: int = 0  # the first of the messages, which are the question of a pair: no answer among them is to be learnt

    @property
    def marked(self) -> int:
        """Answers that the data ask not to learn."""
        return sum(map(self.is_marked, range(len(self.messages))))

    def is_marked(self, number: int) -> bool:
        """Whether a message is an answer that the data ask not to learn."""
        return self.messages[number]["role"] == ASSISTANT and not self.learn[number]

    def is_answer(self, number: int) -> bool:
        """Whether a message is an answer to be learnt, should it say anything."""
        return self.messages[number]["role"] == ASSISTANT and self.learn[number] and number >= self.asked

    def fields_beside(self, read: str) -> set[str]:
        """Fields of the messages that are neither known here nor named in the text `read`, such as a template."""
        return {name for message in self.messages for name in message if name not in KNOWN_FIELDS and name not in read}


def example_of(messages: Sequence[Any], system: Any = None, tools: Any = None) -> Example:
    """A conversation of a row's messages, with its `system` and `tools` columns; ValueError names what is wrong."""
    read = [read_message(message, number) for number, message in enumerate(messages, start=1)]
    if system is not None:
        if not isinstance(system, str):
            raise ValueError(f"the system column holds a {type(system).__name__}, not a text")
        own = read[0][0] if read and read[0][0]["role"] == SYSTEM else None
        if own and system.strip() and own["content"].strip() != system.strip():
            raise ValueError("the system column says something else than the system message: leave one of them out")
        if system.strip() and read and not own:
            read.insert(0, ({"role": SYSTEM, "content": system}, True))
    return Example(tuple(message for message, _ in read), tuple(learn for _, learn in read), read_tools(tools))


def exchange(question: str, answer: str, system: Any = None, tools: Any = None) -> Example:
    """One question and its answer."""
    return example_of(({"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}), system, tools)


def read_message(message: Any, number: int) -> tuple[Message, bool]:
    """A message in the one spelling, without nulls and marks, and whether it may be learnt; ValueError names it."""
    if isinstance(message, dict) and len(cast(dict[Any, Any], message)) == 2:  # the usual one, without a detour
        usual = cast(Message, message)
        content = usual.get("content")
        if isinstance(content, str) and (role := ROLES.get(str(usual.get("role")))):
            return {"role": role, "content": content}, True
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is a {type(message).__name__}, not an object with role and content")
    fields = _fields_with_values(cast(Mapping[Any, Any], message))
    names = ", ".join(fields) or "nothing"
    role = _one_value(fields, ROLE_FIELDS, number, ROLES.get)
    content = _one_value(fields, CONTENT_FIELDS, number, lambda text: text)
    called = role.strip().lower() if isinstance(role, str) else ""
    if called in (FUNCTION_CALL, TOOL_CALL) and isinstance(content, str | dict):
        called, fields["tool_calls"], content = ASSISTANT, [content], None
    if role is None:
        raise ValueError(f"message {number} has no role; it has {names}")
    if called not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    learn = _may_be_learnt(fields, ROLES[called], number)
    calls = _listed_in(fields.pop("tool_calls", None))
    if (call := _listed_in(fields.pop(FUNCTION_CALL, None))) and not calls:
        calls = [call]
    if content is None and (calls or (ROLES[called] == ASSISTANT and fields.keys() <= KNOWN_FIELDS)):
        content = ""  # an answer of nothing, which nobody learns
    if content is None:
        raise ValueError(f"message {number} has no content; it has {names}")
    kept: Message = {"role": ROLES[called], "content": _text_of(content, number, ROLES[called])}
    if calls:
        if kept["role"] != ASSISTANT:
            raise ValueError(f"message {number} is by the {kept['role']} and has tool_calls, which only answers have")
        kept["tool_calls"] = _read_calls(calls, number)
    fields = {name: own for name, own in fields.items() if name not in REASONING_FIELDS or own != ""}
    if (reasoning := _one_value(fields, REASONING_FIELDS, number, str.strip)) is not None:
        if not isinstance(reasoning, str):
            raise ValueError(f"message {number} has a {type(reasoning).__name__} for its reasoning, not a text")
        kept["reasoning_content"] = reasoning
    return kept | fields, learn


def _fields_with_values(message: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields of a message without nulls, those that are known under their own names."""
    given = {str(name): value for name, value in message.items() if not is_null(value)}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        known = name.strip().lower()
        fields[known if known in _IN_ANY_CASE and known not in given else name] = value
    return fields


def _one_value(fields: dict[str, Any], names: Sequence[str], number: int, meaning: Callable[[str], Any]) -> Any:
    """Take out what stands under any of some names of one field; ValueError where two of them mean different things."""
    found = {name: fields.pop(name) for name in names if name in fields}
    (first, one), *others = list(found.items()) or [("", None)]
    for name, other in others:
        same = one == other or (isinstance(one, str) and isinstance(other, str) and meaning(one) == meaning(other))
        if not same:
            raise ValueError(
                f"message {number} has {first} {shown(one, 30)} and {name} {shown(other, 30)}: leave one of them out"
            )
    return one


def _text_of(content: Any, number: int, role: str) -> str:
    """The content of a message: a text, or the texts of its parts; of a tool that answered with data, their JSON."""
    if isinstance(content, str):
        return content
    is_part = isinstance(content, Mapping) and "text" in content
    if role == TOOL and not is_part and not _are_parts(content) and isinstance(content, Mapping | list | int | float):
        return as_json(content)
    if not is_part and not isinstance(content, list):
        raise ValueError(f"message {number} has {kind_of_value(content)} for its content, not a text")
    texts: list[str] = []
    for part in cast(list[Any], [content] if is_part else content):
        fields = cast(Mapping[str, Any], part) if isinstance(part, Mapping) else {"type": type(part).__name__}
        text = part if isinstance(part, str) else fields.get("text")
        if not isinstance(text, str) or (fields.get("type", "text") not in TEXT_PARTS and not isinstance(part, str)):
            raise ValueError(
                f"message {number} has a part of type {fields.get('type')!r}; only texts can be trained on"
            )
        texts.append(text)
    return "".join(texts)


def _are_parts(content: Any) -> bool:
    """Whether a content is a list of parts: of texts, or of objects that say what they are."""
    parts = cast(list[Any], content) if isinstance(content, list) else []
    return bool(parts) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in parts
    )


def _may_be_learnt(fields: dict[str, Any], role: str, number: int) -> bool:
    """Take the marks out of a message's fields; false where one of them says not to learn it."""
    if unclear := next((name for name in fields if name not in LEARN_FIELDS and OTHER_MARKS.fullmatch(name)), None):
        raise ValueError(
            f"message {number} has {unclear} {shown(fields[unclear], 30)}, which may say whether to learn it: call it "
            f"train, true or false, if it does, else leave it out"
        )
    marks = {name: fields.pop(name) for name in LEARN_FIELDS if name in fields}
    for name, mark in marks.items():
        if mark not in (0, 1) or isinstance(mark, str):
            raise ValueError(f"message {number} has {name} {mark!r}: only 0, 1, false and true can be honoured")
        if mark and name != "weight" and role != ASSISTANT:
            raise ValueError(
                f"message {number} is by the {role} and has {name} {mark!r}: only answers can be learnt one by one; "
                "train_on: everything learns all"
            )
    return all(marks.values())


def _read_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as transformers' templates expect them: the function's name, and its arguments as a mapping."""
    calls = _from_json(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise ValueError(f"message {number} has a {type(calls).__name__} for its tool_calls, not a list")
    read: list[dict[str, Any]] = []
    for own in cast(list[Any], calls):
        call = _fields_of(_from_json(own))
        function = _fields_of(_from_json(call.get("function", call)))
        if not isinstance(function.get("name"), str):
            raise ValueError(f"message {number} has a tool call without the name of its function")
        arguments = _from_json(function.get("arguments", function.get("parameters")))
        function = {"name": function["name"], "arguments": dict[str, Any]() if arguments is None else arguments}
        others = {name: value for name, value in call.items() if name in ("id", "type") and value is not None}
        read.append({"type": "function", **others, "function": function})
    return read


def _fields_of(value: Any) -> Mapping[str, Any]:
    """An object of JSON; an empty one where the value is something else."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def tools_of(row: Mapping[str, Any]) -> Any:
    """What stands in a row's `tools` column, or else in OpenAI's old `functions`, where that lists objects."""
    if _listed_in(tools := row.get("tools")):
        return tools
    functions = _listed_in(row.get("functions"))
    listed = [_from_json(own) for own in cast(list[Any], functions)] if isinstance(functions, list) else []
    if not listed or not all(isinstance(own, Mapping) for own in listed):
        return tools
    return [own if "function" in own else {"type": "function", "function": own} for own in listed]


def read_tools(tools: Any) -> tuple[Any, ...] | None:
    """The `tools` column: a list of JSON schemas, or such a list as JSON text; None where there are none."""
    if not (read := _listed_in(tools)):
        return None
    if not isinstance(read, list):
        raise ValueError(f"the tools column holds a {type(tools).__name__} that is no list of tools")
    listed = [_from_json(tool) for tool in cast(list[Any], read)]
    if not all(isinstance(tool, Mapping) for tool in listed):
        raise ValueError("the tools column holds something that is no JSON schema of a tool")
    return tuple(listed)


def _listed_in(value: Any) -> Any:
    """What a cell of tools or of their calls lists, also as JSON; None where it says in any way that there are none."""
    read = _from_json(value)
    return None if is_null(read) or (isinstance(read, str) and read.strip() in NO_TOOLS) else read


def _from_json(value: Any) -> Any:
    """What a JSON text stands for, where it stands for an object or a list; everything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def as_json(value: Any) -> str:
    """JSON as transformers' `tojson` writes it in a template; ValueError for a value that JSON has no form for."""
    return json.dumps(value, ensure_ascii=False, default=_refuse)


def _refuse(value: Any) -> Any:
    raise ValueError(
        f"data of a tool holds {shown(value, 30)} of type {type(value).__name__}, which JSON does not have: write "
        "a text or a number"
    )
