"""transformers 5.23 compiles chat templates in a sandbox that bounds neither time nor memory; here both are bounded.

A template means what it means there. What it does is counted: a turn of a loop, a call, and 20 characters or a value
that it makes are a unit each, and for one conversation at most MAX_UNITS are allowed. What could be large is counted
before it is made. No name in a template reaches the counter, which is an attribute of the environment.
"""

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

from jinja2 import Environment, Template, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import TemplateError
from jinja2.visitor import NodeTransformer

MAX_UNITS = 5_000_000
MAX_SECONDS = 30.0  # of this thread on a processor: a unit may be a search in a long text
UNIT_CHARACTERS = 20
MAX_NUMBER = 10_000  # as a width or a count of a filter
MAX_BITS = 4_096  # of a power
# what a template may raise that it refuses messages with, or that is broken
RENDERING_ERRORS = (
    TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError,
    SyntaxError,
)  # fmt: skip
_WIDTH = re.compile(r"\d{5,}|\*")  # in a format
_SIZED = (str, list, tuple, dict, set, frozenset, range)  # of others, to ask for the length may do something
_SPEND, _CHARGED = "isotune_spend", "isotune_charged"


class TemplateTooCostly(Exception):
    """A template that would go on without end, or fill the memory; the message says what is allowed."""

    def __init__(self) -> None:
        super().__init__(
            f"for one conversation it may take {MAX_UNITS:,} turns of its loops, make {MAX_UNITS * UNIT_CHARACTERS:,} "
            f"characters, and compute for {MAX_SECONDS:.0f} seconds"
        )


class _Budget(threading.local):
    """What is left to this thread's rendering; None where none is bounded."""

    left: int | None = None
    deadline = 0.0

    def spend(self, units: int = 1) -> bool:
        """Take some units off."""
        if self.left is not None:
            self.left -= units
            if self.left < 0 or time.thread_time() > self.deadline:
                raise TemplateTooCostly
        return True


_budget = _Budget()


def _step() -> bool:
    return _budget.spend()


@contextmanager
def bounded() -> Iterator[None]:
    """Within it what transformers renders is bounded, each time anew; TemplateTooCostly where it exceeds that."""
    _bound_compilation()
    before = _budget.left, _budget.deadline
    _budget.left, _budget.deadline = MAX_UNITS, time.thread_time() + MAX_SECONDS
    try:
        yield
    finally:
        _budget.left, _budget.deadline = before


@functools.cache
def _bound_compilation() -> None:
    """Let `render_jinja_template` compile the bounded template within `bounded`, and its own elsewhere."""
    from transformers.utils import chat_template_utils

    library: Any = chat_template_utils
    stock = library._compile_jinja_template
    library._compile_jinja_template = lambda text: stock(text) if _budget.left is None else _compiled(text)


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    return bounded_environment().from_string(template)


def bounded_environment() -> Environment:
    """A sandbox of the library's, with its filters and functions, in which all that a template does counts."""
    from transformers.utils import chat_template_utils

    environment: Any = cast(Any, chat_template_utils)._cached_compile_jinja_template("").environment
    environment.__class__ = _bounded_class(type(environment))
    environment.code_generator_class = _BoundedCode
    environment.filters = {name: _counting(name, each) for name, each in environment.filters.items()}
    environment.globals["range"] = _counting_range(environment.globals["range"])
    environment.finalize = _charged
    return environment


@functools.cache
def _bounded_class(sandbox: type[Any]) -> type[Any]:
    class Bounded(sandbox):
        intercepted_binops = frozenset(("*", "**", "+", "%", "//", "/", "-"))
        isotune_spend = staticmethod(_step)
        isotune_charged = staticmethod(_charged)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _budget.spend(_units_of_operation(operator, left, right))
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            if __obj is _step:
                return _step()
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps those that format
            if isinstance(text := getattr(method, "__self__", None), str):
                _check_growth(method.__name__, text, args, kwargs)
            elif __obj is __self.globals.get("lipsum"):
                _check_growth("lipsum", "", args, kwargs)
            return _charged(super().call(__context, __obj, *args, **kwargs))

    return Bounded


class _BoundedCode(CodeGenerator):
    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        """The code of a whole template, once its loops, calls and lists count."""
        super().visit_Template(cast(nodes.Template, _Counted().visit(node).set_environment(self.environment)), frame)


class _Counted(NodeTransformer):
    """Puts the counter into loops, bodies of macros, concatenations, and lists that hold more than constants."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """A unit a turn, also of one that the loop's condition leaves out."""
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_call(_SPEND, lineno=node.lineno), node.test, lineno=node.lineno)
        return _with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        """A unit a call."""
        return _with_step(cast(nodes.Macro, self.generic_visit(node)))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """What `~` makes."""
        self.generic_visit(node)
        return _call(_CHARGED, node, lineno=node.lineno)

    def visit_List(self, node: Any) -> nodes.Node:
        """What it holds, whole: a list of a list twice, again and again, would be without end."""
        self.generic_visit(node)
        is_value = getattr(node, "ctx", "load") == "load" and next(node.find_all((nodes.Name, nodes.Call)), None)
        return _call(_CHARGED, node, lineno=node.lineno) if is_value else node

    visit_Tuple = visit_Dict = visit_List


def _with_step(node: Any) -> nodes.Node:
    step = nodes.ExprStmt(_call(_SPEND, lineno=node.lineno), lineno=node.lineno)
    node.body = [step, *node.body]
    return node


def _call(name: str, *arguments: nodes.Expr, lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=lineno), [*arguments], [], None, None, lineno=lineno)


def _units(value: Any) -> int:
    """Units of a value, with all that it holds as often as it holds it."""
    if isinstance(value, str):
        return 1 + len(value) // UNIT_CHARACTERS
    units, stack = 0, [value]
    while stack:
        each = stack.pop()
        units += 1 + len(each) // UNIT_CHARACTERS if isinstance(each, str) else 1
        if isinstance(each, list | tuple | set | frozenset):
            stack.extend(each)
        elif isinstance(each, dict):
            stack.extend(cast("dict[Any, Any]", each).values())
        if units > MAX_UNITS:
            raise TemplateTooCostly
    return units


def _charged(value: Any) -> Any:
    """The value, once it is paid for."""
    if _budget.left is not None:
        _budget.spend(_units(value))
    return value


def _units_of_operation(operator: str, left: Any, right: Any) -> int:
    """Units of what an operation makes, before it makes it."""
    sizes = [len(each) if isinstance(each, _SIZED) else None for each in (left, right)]
    if operator == "*" and sizes != [None, None]:
        count = right if sizes[0] is not None else left
        size = sizes[0] if sizes[0] is not None else sizes[1]
        return 1 + cast(int, size) * max(0, count) // (UNIT_CHARACTERS if isinstance(left, str) else 1)
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and right * left.bit_length() > MAX_BITS:
        raise TemplateTooCostly
    if operator == "%" and isinstance(left, str):
        _check_growth("format", left, (right,), {})
    if operator == "+" and None not in sizes:
        return 1 + sum(cast("list[int]", sizes)) // (UNIT_CHARACTERS if isinstance(left, str) else 1)
    return 1


def _check_growth(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pay for what a filter or a method of a text makes where that may be far longer than what it is given."""
    given = [*args, *kwargs.values()]
    if any(isinstance(each, int) and abs(each) > MAX_NUMBER for each in given):
        raise TemplateTooCostly
    size = len(value) if isinstance(value, _SIZED) else 0
    texts = [len(each) for each in given if isinstance(each, str)]
    numbers = [abs(each) for each in given if isinstance(each, int)]
    if name in ("format", "format_map") and _WIDTH.search(str(value)):
        raise TemplateTooCostly
    if name == "replace" and len(texts) > 1:
        size = (size // max(1, texts[0]) + 1) * texts[1]
    elif name == "join":
        longest = max(
            (len(each) for each in given if isinstance(each, _SIZED) and not isinstance(each, str)), default=1
        )
        size = size * max(texts, default=1) * longest
    elif name in ("indent", "expandtabs", "tojson"):
        size = size * max([*numbers, *texts], default=1)
    else:
        size += sum(numbers)
    _budget.spend(1 + size // UNIT_CHARACTERS)


def _counting(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is paid for."""
    place = 1 if hasattr(stock, "jinja_pass_arg") else 0  # of the value, behind what Jinja passes

    @functools.wraps(stock)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        if _budget.left is None:
            return stock(*args, **kwargs)
        if name == "join" and len(args) > place and not isinstance(args[place], _SIZED):
            args = (*args[:place], list(args[place]), *args[place + 1 :])
        value = args[place] if len(args) > place else None
        _check_growth(name, value, args[place + 1 :], kwargs)
        return _charged(stock(*args, **kwargs))

    return filtered


def _counting_range(stock: Callable[..., range]) -> Callable[..., range]:
    def counting_range(*args: int) -> range:
        found = stock(*args)
        _budget.spend(1 + len(found) // UNIT_CHARACTERS)
        return found

    return counting_range
