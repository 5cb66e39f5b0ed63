"""The server's process: its socket, its signals, and the model that it opens before it answers anybody."""

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from isotune.config.recipes import project_of
from isotune.distributed.device import choose_device
from isotune.evaluation.models import generation_model_of_run, load_run_classifier
from isotune.evaluation.prediction.ensembles import read_ensemble
from isotune.evaluation.results import CLASSIFICATION, GENERATION
from isotune.io.errors import UserError
from isotune.io.run_files import ENSEMBLE
from isotune.models.finished_run import FinishedRun, is_classifier, read_run
from isotune.serving.app import Routes, make_app
from isotune.serving.classification import replay as classifier_replay
from isotune.serving.classification.ensemble import open_service
from isotune.serving.classification.ensemble_replay import replay_ensemble
from isotune.serving.classification.routes import ClassifierRoutes
from isotune.serving.classification.service import ClassifierService
from isotune.serving.classification.similar import SimilarErrors
from isotune.serving.generation import replay as generator_replay
from isotune.serving.generation.routes import GeneratorRoutes
from isotune.serving.generation.service import GeneratorService
from isotune.serving.guard import LOOPBACK
from isotune.serving.limits import Limits
from isotune.serving.replay import Replayed, newest_evaluation
from isotune.serving.worker import Worker

REPLAYED_ROWS = {CLASSIFICATION: 512, GENERATION: 64}  # of an evaluation
EVERYWHERE = ("0.0.0.0", "::")
STOP_SECONDS = 5  # more than a request has, before a stop gives up requests in flight


@dataclass(frozen=True)
class Address:
    """Where the server listens, and the further names under which it may be asked."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()

    @property
    def all_names(self) -> frozenset[str]:
        """Every name that a request's Host may have."""
        return frozenset({*LOOPBACK, *self.names, *({self.host} - set(EVERYWHERE))})

    def check(self) -> None:
        """UserError where nobody could ask from elsewhere although the server listens there."""
        if self.host in EVERYWHERE and not self.names:
            raise UserError(
                f"--host {self.host} is reached under names that only you know: say them by --names, such as the "
                "machine's own; a request under another name is refused"
            )


def serve(run: Path, address: Address, limits: Limits, replayed_rows: int | None = None) -> None:
    """Open a run or an ensemble, replay its evaluation and answer requests until a signal.

    `replayed_rows` 0 passes the replay over.

    UserError where the address is taken, the run is not finished, or its evaluation cannot be replayed.
    """
    address.check()
    signals = _Signals()
    with signals.handled(), _bound(address) as listening:
        routes, replayed = open_run(run, limits, replayed_rows)
        app = make_app(routes, replayed, address.all_names)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving     {run} at http://{shown}:{port} (Ctrl-C stops)", flush=True)
        if host not in LOOPBACK:
            print("warning     whoever reaches this address may use the model: nobody is asked for a password")
        config = uvicorn.Config(
            app, log_config=None, log_level="critical", access_log=False, lifespan="on", ws="none",
            timeout_graceful_shutdown=int(limits.seconds) + STOP_SECONDS, server_header=False, proxy_headers=False,
        )  # fmt: skip
        signals.serving = True
        uvicorn.Server(config).run(sockets=[listening])


class _Signals:
    """SIGINT and SIGTERM: they end the process with status 0 before it serves; then uvicorn has its own handlers.

    When uvicorn is done it sends the signals that it got once more, to the handlers that were there before: to these,
    so that a stop that was asked for is no failure.
    """

    def __init__(self) -> None:
        self.serving = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle one."""
        if not self.serving:
            sys.exit(0)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Within it both signals come here."""
        before = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _bound(address: Address) -> Iterator[socket.socket]:
    """A socket at the address, taken before the model is opened; what asks by then waits for the server."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host {address.host} is no address of this machine: {error.strerror}") from error
    listening = socket.socket(family, kind, protocol)
    with listening:
        if sys.platform != "win32":  # where it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(where)
            listening.listen()  # two servers can bind one port, and one can listen
        except OSError as error:
            what = f"{address.host} port {address.port} cannot be had: {error.strerror}"
            raise UserError(f"{what}: choose another --port") from error
        yield listening


def open_run(run: Path, limits: Limits, replayed_rows: int | None) -> tuple[Routes, str | None]:
    """The endpoints of a run's kind, or of an ensemble, and what was replayed; None where that is passed over."""
    if (run / ENSEMBLE).is_file():
        routes, replayed = _open_ensemble(run, limits, replayed_rows)
    else:
        finished = read_run(run)
        if project_of(finished.settings) is not None:
            raise UserError(f"{run} reads battles, a prompt with two answers: isotune predict takes files of them")
        opens = _open_classifier if is_classifier(finished) else _open_generator
        routes, replayed = opens(finished, limits, replayed_rows)
    if replayed is not None:
        replayed.check()
        print(f"replayed    {replayed} ({replayed.folder})", flush=True)
        if replayed.note:
            print(f"note        {replayed.note}", flush=True)
    return routes, None if replayed is None else str(replayed)


def _open_generator(run: FinishedRun, limits: Limits, rows: int | None) -> tuple[Routes, Replayed | None]:
    count = REPLAYED_ROWS[GENERATION] if rows is None else rows
    evaluated = newest_evaluation(run.folder, GENERATION, generator_replay.why_not) if count else None
    service = GeneratorService(generation_model_of_run(run.folder, torch.device(choose_device())))
    replayed = None
    if evaluated is not None:
        replayed = generator_replay.replay(evaluated, service, generator_replay.samples_of(evaluated), count)
    return GeneratorRoutes(_name(run.folder), Worker(service, limits), service, int(time.time())), replayed


def _open_classifier(run: FinishedRun, limits: Limits, rows: int | None) -> tuple[Routes, Replayed | None]:
    count = REPLAYED_ROWS[CLASSIFICATION] if rows is None else rows
    classifier = load_run_classifier(run.folder, torch.device(choose_device()), torch.float32)
    why_not = partial(classifier_replay.why_not, classifier=classifier)
    evaluated = newest_evaluation(run.folder, CLASSIFICATION, why_not) if count else None
    service, errors, replayed = ClassifierService(classifier), classifier_replay.newest_errors(run.folder), None
    if evaluated is not None:
        read = classifier_replay.rows_of(evaluated, classifier)
        replayed = classifier_replay.replay(evaluated, service, read, count)
        errors = classifier_replay.errors_among(evaluated, read)
    return ClassifierRoutes(_name(run.folder), Worker(service, limits), service, SimilarErrors(errors)), replayed


def _open_ensemble(folder: Path, limits: Limits, rows: int | None) -> tuple[Routes, Replayed | None]:
    count = REPLAYED_ROWS[CLASSIFICATION] if rows is None else rows
    device = torch.device(choose_device())
    service = open_service(read_ensemble(folder), lambda run: load_run_classifier(run, device, torch.float32))
    replayed, errors = replay_ensemble(service, count) if count else (None, [])
    return ClassifierRoutes(_name(folder), Worker(service, limits), service, SimilarErrors(errors)), replayed


def _name(folder: Path) -> str:
    return folder.resolve().name
