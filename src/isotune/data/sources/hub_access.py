"""Whether the Hub answers, how long it asks to wait, and the one sentence for what it refuses."""

import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

from isotune.io.errors import UserError, first_line, is_first_process

REACH_SECONDS = 5.0
TRIES = 5  # of a request that the Hub wants to have later
LONGEST_PAUSE_SECONDS = 300

Kind = Literal["model", "dataset"]
T = TypeVar("T")


def is_offline(kind: Kind) -> bool:
    """Whether the user, or an earlier try, has said that the Hub is not to be asked."""
    from huggingface_hub import constants

    said = kind == "dataset" and os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    return constants.is_offline_mode() or said


def go_offline() -> None:
    """Let no library ask the Hub from now on, in this process and in those that it starts."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True  # read once, at its import


answered: set[str] = set()  # endpoints that have


def hub_reached() -> bool:
    """`hub_answers`, asked until it does."""
    from huggingface_hub import constants

    if constants.ENDPOINT not in answered and hub_answers():
        answered.add(constants.ENDPOINT)
    return constants.ENDPOINT in answered


def hub_answers() -> bool:
    """Whether the Hub answers within `REACH_SECONDS`; asked in a thread, as looking up a host name obeys no timeout."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    status_codes: list[int] = []

    def request() -> None:
        with suppress(Exception):  # whatever the transport raises, its class differs between its versions
            status_codes.append(get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS).status_code)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(status_codes)


def wait_if_told(call: Callable[[], T]) -> T:
    """`call`, again after the pause that the Hub asks for where it has had too many requests (429)."""
    from huggingface_hub.utils import parse_ratelimit_headers

    tries_left = TRIES
    while True:
        tries_left -= 1
        try:
            return call()
        except Exception as error:
            response = getattr(_hub_error(error), "response", None)
            if response is None or response.status_code != 429 or not tries_left:
                raise
            limits, told = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
            waited = 2 ** (TRIES - tries_left)
            seconds = int(told) if told.isdigit() else limits.reset_in_seconds + 1 if limits else waited
        seconds = min(seconds, LONGEST_PAUSE_SECONDS)
        if is_first_process():
            print(
                f"note        the Hugging Face Hub asks to wait {seconds} s (429, too many requests)", file=sys.stderr
            )
        time.sleep(seconds)


@contextmanager
def hub_errors_named(kind: Kind, name: str, revision: str | None = None, prefix: str = "") -> Generator[None]:
    """Turn what the Hub refuses, and a connection that fails, into one sentence about the repository."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (sentence := refusal_of(error, kind, name, revision)) is None:
            raise
        raise UserError(prefix + sentence) from error


def refusal_of(error: BaseException, kind: Kind, name: str, revision: str | None = None) -> str | None:
    """The sentence for an error that the Hub's client raised, or that was raised because of one; None for others."""
    from huggingface_hub import constants, errors, get_token

    what, found = named(kind, name), _hub_error(error)
    place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    log_in = "" if get_token() else ": log in with `hf auth login` or set HF_TOKEN if it is private"
    if found is None:
        return None
    if isinstance(found, errors.GatedRepoError):
        then = "" if get_token() else ", then log in with `hf auth login` or set HF_TOKEN"
        return f"{what} is gated: ask its owners for access at {place}{then}"
    if isinstance(found, errors.RevisionNotFoundError):
        return f"{what} has no revision {revision!r}"
    if isinstance(found, errors.RepositoryNotFoundError):
        return f"the Hub has no {WORDS[kind]} {name!r} that this user may read{log_in}"
    if isinstance(found, errors.EntryNotFoundError):
        return f"{what} lacks a file: {first_line(found)}"
    if isinstance(found, errors.HfHubHTTPError):
        status = found.response.status_code
        reason = "it has had too many requests" if status == 429 else first_line(found)
        return f"{what} cannot be fetched: the Hub answers {status}, {reason}; {_AGAIN}"
    return f"{what} cannot be fetched ({first_line(found)}); {_AGAIN}"


def _hub_error(error: BaseException) -> Any:
    """The error of the Hub's client, or of its transport, in a chain of causes."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    kinds = (errors.HfHubHTTPError, httpx.HTTPError, errors.EntryNotFoundError)
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    # the Hub's answer says more than what a library made of it
    return next((each for kind in kinds for each in chain if isinstance(each, kind)), None)


_AGAIN = "the same command goes on from what is cached"
WORDS = {"model": "model", "dataset": "data set"}


def named(kind: Kind, name: str, revision: str | None = None) -> str:
    """How an error sentence names a repository."""
    return f"the {WORDS[kind]} {name!r}{f' at revision {revision!r}' if revision else ''}"
