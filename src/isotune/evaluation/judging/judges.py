"""Who judges: a run or a model on this machine, a server with OpenAI's interface, or a command."""

import json
import os
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from isotune.data.sources.hub import is_hub_id
from isotune.evaluation.distributed_eval import Ranks
from isotune.evaluation.generation.completion import prompt_tokens
from isotune.evaluation.generation.evaluate import prompt_of, reference_of, score_references
from isotune.evaluation.judging.verdicts import MARKS, TIE, Judge, Pair, read_verdict
from isotune.evaluation.models import GenerationModel, generation_model_named, generation_model_of_run
from isotune.evaluation.tasks import EvalSample
from isotune.io.errors import UserError, first_line, shown
from isotune.io.run_files import RECIPE
from isotune.models.base.folder import why_no_model
from isotune.models.finished_run import is_classifier, read_run
from isotune.models.opening import load_pretrained_config

TOKEN_VARIABLE = "OPENAI_API_KEY"  # the name that every client of this interface reads
CLIENTS = 8  # requests that a server is asked at once
TRIES, FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5, 1.0, 60.0
ANSWER_SECONDS = 300.0
ANSWER_TOKENS = 2_048  # a judge may think before its verdict
SERVER, COMMAND, RUN, MODEL = "server", "command", "run", "model"
AGAIN = (408, 409, 429, 500, 502, 503, 504)


def kind_of(name: str, model: str | None = None) -> str:
    """What the name of a judge means in a word; UserError where it, and `model` beside it, mean nothing.

    An address with http:// or https:// is a server, whose model `model` names; a folder with a run, a folder with a
    model and a Hub id are models; any other name that can be executed is a command.
    """
    if urlsplit(name).scheme in ("http", "https"):
        return SERVER
    if model:
        raise UserError(f"--judge_model names the model of a server, and --judge {shown(name)} is no address")
    if (Path(name) / RECIPE).is_file():
        return RUN
    return COMMAND if not Path(name).is_dir() and shutil.which(_words(name)[0]) else MODEL


def check_judge(name: str, model: str | None = None) -> None:
    """UserError where a judge means nothing, before anything is generated.

    So it is where a server that is to judge by its first model, which it is asked for, does not answer.
    """
    kind = kind_of(name, model)
    if kind == SERVER:
        ServerJudge(name, model)
    elif kind == RUN and is_classifier(read_run(name)):
        raise UserError(f"--judge {name} is the run of a classifier, which judges nothing")
    elif kind == MODEL:
        if why := why_no_model(name):
            raise UserError(f"--judge {why}")
        if not Path(name).is_dir() and not is_hub_id(name):
            raise UserError(f"--judge {shown(name)} is no run, no model, no command and no address")
        load_pretrained_config(name, "the judge")


def open_judge(name: str, ranks: Ranks, model: str | None = None) -> Judge | None:
    """The judge that a name means; None on a rank that has nothing to ask it. Every rank loads a model."""
    kind = kind_of(name, model)
    if kind in (SERVER, COMMAND) and not ranks.is_main:
        return None
    if kind == SERVER:
        return ServerJudge(name, model)
    if kind == COMMAND:
        return CommandJudge(_words(name))
    load = generation_model_of_run if kind == RUN else generation_model_named
    return ModelJudge(name, load(name, ranks.device), ranks)


def _words(name: str) -> list[str]:
    try:
        return shlex.split(name) or [name]
    except ValueError as error:
        raise UserError(f"--judge {shown(name)} is no command: {error}") from None


@dataclass(frozen=True)
class ModelJudge:
    """A model that is asked which verdict is likeliest, by the sum of the log-probabilities of its tokens."""

    name: str
    lm: GenerationModel
    ranks: Ranks

    def verdicts(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Every pair has one: the likeliest of the three, and a tie where two are."""
        marks = [f"[[{mark}]]" for mark in MARKS]
        references = []
        for pair in pairs:
            where = f"{pair.where}, of which {self.name} is to judge"
            sample = EvalSample(0, ({"role": "user", "content": pair.text},), "", where)
            prompt = prompt_of(self.lm, sample).text
            for mark in marks:
                marked = replace(sample, id=len(references), reference=mark)
                references.append(reference_of(self.lm, marked, prompt))
                prompt_tokens(self.lm, prompt + references[-1].text, where)
        nats = score_references(self.lm, references, self.ranks)
        found: list[float | None] = []
        for start in range(0, len(references), len(marks)):
            own = [nats[start + k].nll for k in range(len(marks))]
            best = [share for share, nll in zip(MARKS.values(), own, strict=True) if nll == min(own)]
            found.append(best[0] if len(best) == 1 else TIE)
        return found


@dataclass(frozen=True)
class CommandJudge:
    """A command that reads a JSON line for each pair on its standard input and writes a line with each verdict."""

    words: Sequence[str]

    def verdicts(self, pairs: Sequence[Pair]) -> list[float | None]:
        """By one start of the command; UserError where it fails or answers another number of lines."""
        keys = ("question", "first", "second", "text")
        lines = "".join(json.dumps({key: getattr(pair, key) for key in keys}) + "\n" for pair in pairs)
        try:
            done = subprocess.run(
                self.words, input=lines, capture_output=True, text=True, encoding="utf-8", check=False
            )
        except OSError as error:
            raise UserError(f"--judge: {self.words[0]} cannot be started: {error.strerror}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it printed no reason"])[-1]
            raise UserError(f"--judge: {self.words[0]} ended with {done.returncode}: {shown(last, 200)}")
        said = done.stdout.splitlines()
        if len(said) != len(pairs):
            raise UserError(
                f"--judge: {self.words[0]} wrote {len(said):,} lines for {len(pairs):,} pairs: it writes A, B or tie "
                "for each line that it reads"
            )
        return [read_verdict(line) for line in said]


class ServerJudge:
    """A server with OpenAI's POST /chat/completions below the address, such as http://localhost:8000/v1."""

    def __init__(self, address: str, model: str | None = None) -> None:
        self.address = address.rstrip("/")
        # a token that is sent on to where a redirect leads would be somebody else's
        self._open = urllib.request.build_opener(_NoRedirect()).open
        self.model = model or self._first_model()

    def verdicts(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Some requests at once; UserError where the server cannot be reached or refuses."""
        bar = tqdm(total=len(pairs), desc="judging", unit="verdict", dynamic_ncols=True)

        def ask(pair: Pair) -> float | None:
            verdict = self._verdict(pair)
            bar.update()
            return verdict

        with bar, ThreadPoolExecutor(CLIENTS) as pool:
            futures = [pool.submit(ask, pair) for pair in pairs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _verdict(self, pair: Pair) -> float | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": pair.text}],
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
        }
        answer = self._ask("chat/completions", body)
        try:
            said = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.address} answered what is no completion: {shown(answer)}") from None
        return read_verdict(said) if isinstance(said, str) else None

    def _first_model(self) -> str:
        try:
            return str(self._ask("models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.address} names no model: say which by --judge_model") from None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A JSON answer; what may pass is tried again."""
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN_VARIABLE):
            headers["Authorization"] = f"Bearer {token}"
        content = None if body is None else json.dumps(body).encode()
        wait = FIRST_WAIT_SECONDS
        for left in reversed(range(TRIES)):
            asked = urllib.request.Request(f"{self.address}/{path}", content, headers)
            try:
                with self._open(asked, timeout=ANSWER_SECONDS) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code not in AGAIN or not left:
                    raise UserError(f"{self.address}/{path} answered {error.code} {error.reason}") from None
                asked_wait = _seconds(error.headers.get("Retry-After"))
                wait = wait if asked_wait is None else asked_wait
            except (OSError, ValueError, HTTPException) as error:
                if isinstance(error, ValueError | InvalidURL) or not left:
                    raise UserError(f"{self.address}/{path} cannot be asked: {first_line(error)}") from None
            time.sleep(min(wait, LONGEST_WAIT_SECONDS))
            wait = max(2 * wait, FIRST_WAIT_SECONDS)
        raise AssertionError("the last try returns or raises")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None leaves the redirect as the answer, an HTTPError."""


def _seconds(header: str | None) -> float | None:
    return float(header) if header and header.isdecimal() else None
