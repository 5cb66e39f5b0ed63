"""How long the text of each beginning of a conversation is, from one rendering where the template shows that it can.

A template is a program that goes through the messages. As long as it has not looked at a message beyond the first k,
it has written what it writes for these k alone. So its list of messages is watched, the place in the text is marked
where each turn begins, and what stands behind the loop is the same for every conversation. Where a template looks ahead
(`loop.last`, the number of messages, a later turn) the beginnings concerned are rendered by themselves.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2 import nodes

from isotune.compat.chat_templates import RENDERING_ERRORS, TemplateTooCostly, bounded, bounded_environment
from isotune.compat.transformers import messages_for_template
from isotune.io.errors import UserError

MARK = "\ue000isotune turn\ue000"  # characters for private use: where a text has them all the same, the count is off
BEGINS, ENDS, LAST_ENDS = "isotune_turn_begins", "isotune_turn_ends", "isotune_last_turn_ends"
PROMPT, MESSAGES = "add_generation_prompt", "messages"


@dataclass
class _Watch:
    """What a template has looked at so far."""

    furthest: int = -1  # message
    inside: bool = False  # a turn
    first: int = 0  # message of the loop
    pending: int | None = None  # message that was asked for, and whose turn has not begun

    def see(self, number: int) -> None:
        """Note that this message was looked at."""
        self.furthest = max(self.furthest, number)

    def step_to(self, number: int) -> None:
        """Note that an iteration asks for this message: the loop over the turns does for its next one, others look."""
        if self.inside or self.pending is not None:
            self.see(number)
        else:
            self.pending = number


class _Watched(Sequence[Any]):
    """Messages that tell which of them are looked at; no list, so that nothing reads them past this."""

    def __init__(self, messages: Sequence[Any], watch: _Watch, offset: int = 0) -> None:
        self._messages, self._watch, self._offset = messages, watch, offset

    def __len__(self) -> int:
        self._watch.see(len(self._messages))
        return len(self._messages) - self._offset

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            asked = cast(Any, place)
            start, stop, step = cast("tuple[int | None, ...]", (asked.start, asked.stop, asked.step))
            if stop is None and step in (None, 1) and (start or 0) >= 0:
                return _Watched(self._messages, self._watch, self._offset + (start or 0))
        if isinstance(place, slice) or place < 0:
            self._watch.see(len(self._messages))
            return self._messages[self._offset :][place]
        self._watch.see(self._offset + place)
        return self._messages[self._offset + place]

    def __iter__(self) -> Iterator[Any]:
        self._watch.first = self._offset
        for number in range(self._offset, len(self._messages) + 1):
            self._watch.step_to(number)
            if number < len(self._messages):
                yield self._messages[number]


@contextmanager
def bounded_rendering() -> Generator[None]:
    """Within it a chat template's work is bounded; UserError where it exceeds that."""
    try:
        with bounded():
            yield
    except TemplateTooCostly as error:
        raise UserError(f"chat_format: the chat template goes on without end: {error}") from error


def prefix_lengths(
    template: str, messages: Sequence[dict[str, Any]], tools: Any, variables: dict[str, Any]
) -> tuple[str, dict[int, int]] | None:
    """The text of some messages, and how long what a template writes for the first of them is, by their number.

    That is without what it writes behind all turns. Numbers whose text the rendering does not show are left out. None
    where the template is none of which this can be known.
    """
    marked = _marked(template)
    if marked is None:
        return None
    watch = _Watch()
    known: list[bool] = []

    def begins() -> str:
        known.append(watch.furthest < watch.first + len(known))
        watch.see(watch.first + len(known) - 1)
        watch.inside, watch.pending = True, None
        return MARK

    def ends() -> str:
        watch.inside = False
        return ""

    watched = _Watched(messages_for_template(messages), watch)
    try:
        with bounded_rendering():
            text: str = marked.render(
                messages=watched, tools=tools, documents=None, add_generation_prompt=False,
                **{BEGINS: begins, ENDS: ends, LAST_ENDS: lambda: MARK}, **variables,
            )  # fmt: skip
    except RENDERING_ERRORS:
        return None
    *turns, after = text.split(MARK)
    if len(turns) != len(known) + 1 or watch.first + len(known) != len(messages):
        return None
    lengths: dict[int, int] = {}
    length = 0
    for number, (turn, is_known) in enumerate(zip(turns, [*known, True], strict=True)):
        length += len(turn)
        if is_known:
            lengths[watch.first + number] = length
    return "".join([*turns, after]), lengths


@lru_cache(maxsize=8)
def _marked(template: str) -> Any:
    """The template with marks where a turn begins and where the last one ends; None where it is not so simple.

    It is where one loop goes through the messages and what follows it depends on nothing but the generation prompt.
    """
    environment = bounded_environment()
    tree = environment.parse(template)
    lists, loops = {MESSAGES}, list[int]()
    for place, node in enumerate(tree.body):
        for assigned in [node] if isinstance(node, nodes.Assign) else node.find_all(nodes.Assign):
            if isinstance(assigned.target, nodes.Name) and _names([assigned.node], "load") & lists:
                lists.add(assigned.target.name)
        if isinstance(node, nodes.For) and _names([node.iter], "load") & lists:
            loops.append(place)
    if len(loops) != 1:
        return None
    before, loop, after = tree.body[: loops[0]], cast(nodes.For, tree.body[loops[0]]), tree.body[loops[0] + 1 :]
    leaves_early = any(True for _ in loop.find_all((nodes.Break, nodes.Continue)))
    if loop.else_ or loop.test or loop.recursive or leaves_early:
        return None
    made = _names([*before, loop], "store") | lists
    if PROMPT in _names([*before, loop], "load") or _names(after, "load") & made:
        return None
    loop.body = [_call(BEGINS), *loop.body, _call(ENDS)]
    tree.body = [*before, loop, _call(LAST_ENDS), *after]
    return environment.from_string(cast(nodes.Template, tree.set_environment(environment)))


def _call(name: str) -> nodes.Output:
    output = nodes.Output([nodes.Call(nodes.Name(name, "load"), [], [], None, None)])
    output.set_lineno(1)
    return output


def _names(found: Iterable[nodes.Node], context: str) -> set[str]:
    """The variables that nodes read (`load`) or set (`store`), macros and fields of namespaces among these."""
    every = [each for node in found for each in (node, *node.find_all(nodes.Node))]
    names = {each.name for each in every if isinstance(each, nodes.Name) and each.ctx == context}
    if context == "store":
        names |= {each.name for each in every if isinstance(each, nodes.NSRef | nodes.Macro)}
    return names
