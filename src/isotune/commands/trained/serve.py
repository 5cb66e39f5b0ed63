"""`isotune serve`: a finished run as a page and an API on this machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from isotune.commands.before_torch import before_torch
from isotune.io.errors import OneSentenceParser, UserError
from isotune.io.extras import need
from isotune.io.parent_process import is_launched

PORTS = 65_535


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The words behind `isotune serve`; UserError says what is wrong with them."""
    parser = OneSentenceParser(
        prog="isotune serve",
        description="A finished run or an ensemble as a page and an API, for this machine unless --host says other.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run, or of an ensemble")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(%(default)s; 0 takes a free one)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (%(default)s)")
    names = "further names under which it may be asked, such as that of the machine"
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help=names)
    parser.add_argument("--replay", type=int, metavar="N", help="rows of the newest evaluation to predict again first "
                        "(512, or 64 answers)")  # fmt: skip
    parser.add_argument("--no_replay", action="store_true", help="serve without having predicted any again")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait (%(default)s)")
    limits.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="of a request (%(default)g)")
    longest = "tokens of the longest answer (%(default)s)"
    limits.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help=longest)
    given = parser.parse_args(argv)
    if not 0 <= given.port <= PORTS:
        raise UserError(f"--port is {given.port}: it is 0 to {PORTS}")
    for name in ("queue", "max_new_tokens", "replay"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}: it is at least 1")
    if not 0 < given.timeout < float("inf"):
        raise UserError(f"--timeout is {given.timeout}: it is a number of seconds above 0")
    if given.no_replay and given.replay is not None:
        raise UserError("--replay and --no_replay exclude each other")
    return given


def run(argv: Sequence[str]) -> None:
    """`isotune serve ARGV`, until SIGINT or SIGTERM."""
    if is_launched():
        raise UserError("isotune serve is one process: start it without a launcher")
    given = read_arguments(argv)
    for package in ("starlette", "uvicorn"):
        need(package, "isotune serve")
    before_torch()
    # torch takes seconds to import, so mistakes on the command line are answered before
    from isotune.serving.limits import Limits
    from isotune.serving.server import Address, serve

    address = Address(given.host, given.port, tuple(given.names))
    bounds = Limits(new_tokens=given.max_new_tokens, waiting=given.queue, seconds=given.timeout)
    serve(Path(given.run), address, bounds, 0 if given.no_replay else given.replay)
