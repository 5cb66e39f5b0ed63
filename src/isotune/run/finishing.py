"""What is left to do once training is over, as steps that status.json records: a start does those that are missing.

A run can be killed between the appearance of RUN/model and its end. A step done again gives the same, so the next start
does what is not recorded, without training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isotune.distributed.launch import Process
from isotune.io.errors import AlreadyDone, Preempted, RunFault, UserError
from isotune.io.run_files import or_empty, read_upload
from isotune.models.finished_run import read_run
from isotune.run.hub import upload_model
from isotune.run.preemption import MODEL_STEP, RunStatus, signals_end_at_once, stop_request, supervised
from isotune.run.run_dir import WEIGHTS_SUFFIX, LeasedDir, RunDir

UPLOAD_STEP = "upload"


@dataclass(frozen=True)
class FinishingStep:
    """A part of finishing a run, which the main process does alone.

    Attributes:
        name: as status.json lists it under `finishing`.
        do: does it, and says so in a line; done twice it gives the same.
        makes: the file in RUN that it makes, without which it is done again.
        is_outside: what it makes is not in RUN, or nothing depends on it: the run counts as finished before it.
    """

    name: str
    do: Callable[[], object]
    makes: Path | None = None
    is_outside: bool = False


def finish(run: LeasedDir, steps: Sequence[FinishingStep]) -> None:
    """Do the steps that are not recorded yet, in their order; the main process calls it, while it is supervised."""
    for step in steps:
        if step.name in run.status.finishing and (step.makes is None or step.makes.is_file()):
            continue
        if step.is_outside:
            run.status.write("finished", 0)
            with signals_end_at_once():
                step.do()
        elif stop_request.by is not None:
            raise Preempted(f"stopped by {stop_request.by} while it finished: {run.again} does the rest")
        else:
            step.do()
        run.status.has_done(step.name, [step.makes] if step.makes is not None else [])


def finish_trained(run: RunDir, process: Process, steps: Sequence[FinishingStep]) -> None:
    """Finish a run whose training was over when its last attempt ended; every rank calls it.

    Raises UserError where RUN/model is broken, and RunFault where a step finds a fault of the run (the alarm of a
    negative control), as the attempt that trained it did.
    """
    with supervised(run, process):
        if not process.is_main:
            return
        process.watchdog.enter("the finishing of the run")
        print(f"trained     {run.model} is there: what is missing of the run is done now", flush=True)
        try:
            _check_model(run)
            run.status.has_done(MODEL_STEP, weights_of(run))
            finish(run, steps)
        except RunFault as fault:
            raise RunFault(
                f"output_dir '{run.path}' holds a run of this recipe that failed at its end: {fault} "
                "(--resume never runs it again from the start)"
            ) from fault


def weights_of(run: LeasedDir) -> list[Path]:
    """The files of RUN/model that hold weights."""
    return sorted(run.model.glob(f"*{WEIGHTS_SUFFIX}"))


def upload_missing(run: RunDir, done: AlreadyDone) -> None:
    """Where the recipe asks for an upload, upload a finished run that was not; raises `done` with its place."""
    if not run.recipe.push_to_hub:
        return
    wanted, uploaded = run.recipe.hub_model_id, or_empty(read_upload, run.path)
    place = str(uploaded.get("repository"))
    if "url" not in uploaded or wanted != (place if "/" in wanted else place.rsplit("/", 1)[-1]):
        uploaded = upload_model(run.recipe)
    status = RunStatus(run.path, is_main=True)
    status.go_on()
    if UPLOAD_STEP not in status.finishing:
        status.write("finished", 0)
        status.has_done(UPLOAD_STEP)
    raise AlreadyDone(f"{done}; it is uploaded to {uploaded['url']}") from None


def _check_model(run: RunDir) -> None:
    """Check that the weight files are complete; they were compared with memory before they got their name."""
    try:
        read_run(run.path)
    except UserError as error:
        raise UserError(f"{error}; without {run.model} the run goes on from its last checkpoint") from error
