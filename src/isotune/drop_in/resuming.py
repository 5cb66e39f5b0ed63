"""Which updates a checkpoint has seen: noted in trainer_state.json, and looked at where a training goes on."""

import hashlib
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from isotune.io.errors import UserError
from isotune.training.training_plan import TrainingPlan


class SeenUpdates(TrainerCallback, ExportableState):
    """What decides the rows of the updates up to a step, as the library stores the state of a callback."""

    def __init__(self, rows: int = 0, schedule: str = "", step: int = 0) -> None:
        self.rows, self.schedule, self.step = rows, schedule, step

    def follow(self, plan: TrainingPlan) -> None:
        """Note the schedule of a plan; how its rows share microbatches changes nothing."""
        own, lengths = plan.schedule, plan.documents.documents.lengths
        self.rows = own.global_batch_size
        whole = hashlib.sha256(repr((own.seed, own.shuffle)).encode())
        for array in (own.rows.starts, lengths[own.rows.documents]):
            whole.update(np.asarray(array, np.int64).tobytes())
        self.schedule = whole.hexdigest()[:16]

    def state(self) -> dict[str, Any]:
        """As trainer_state.json has it."""
        return {"args": {"rows": self.rows, "schedule": self.schedule, "step": self.step}, "attributes": {}}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A trainer that does not know this callback carries its state on as it is: the step tells."""
        self.step = state.global_step


def go_on(state: Any, plan: TrainingPlan, own: SeenUpdates) -> str | None:
    """Let a training begin, or go on from a checkpoint; what to say of that, None where it saw this plan's updates.

    `state` is the library's, as it was loaded, and `own` the callback that notes the updates from here on. UserError
    where those before had another number of rows: the steps that were counted would be other rows here.
    """
    stored: Any = (state.stateful_callbacks or {}).get(SeenUpdates.__name__)
    found: dict[str, Any] = stored["args"] if isinstance(stored, dict) else {}
    own.follow(plan)
    own.step = state.global_step
    # the library looks each callback up in what another trainer may have saved without this one
    state.stateful_callbacks = {**(state.stateful_callbacks or {}), SeenUpdates.__name__: own.state()}
    if not state.global_step:
        return None
    if found.get("step") != state.global_step:
        return (
            f"the checkpoint of step {state.global_step} is of another trainer: weights, optimizer and learning rate "
            "go on from it, and which rows its updates had is not known here"
        )
    if found["rows"] != own.rows:
        raise UserError(
            f"the checkpoint has updates of {found['rows']} rows, and this trainer has {own.rows}: "
            f"say global_batch_size={found['rows']}"
        )
    if found["schedule"] != own.schedule:
        return "the checkpoint is of other rows, or of another seed: from its step on this trainer's are seen"
    return None
