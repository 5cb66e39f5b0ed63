"""The device of a process: a GPU where torch sees one, else Apple's MPS, else the CPU; or the one that is asked for."""

import torch

from isotune.io.errors import UserError

AUTO = "auto"


def choose_device(wanted: str = AUTO, processes: int = 1) -> str:
    """cuda, mps or cpu, for one of that many processes; MPS is for one, because nothing connects several.

    UserError where the device that is asked for is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if wanted == AUTO:
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps and processes == 1 else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda needs a GPU that torch sees, and it sees none: isotune doctor says why")
    if wanted == "mps" and not has_mps:
        raise UserError("device: mps needs a Mac whose torch has MPS: say device: auto")
    if wanted == "mps" and processes > 1:
        raise UserError(f"device: mps is one process, and there are {processes}: say device: cpu, or start one")
    return wanted
