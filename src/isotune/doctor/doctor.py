"""`isotune doctor`: everything about a machine that could spoil a run, on every process of a launch, in one table."""

import time
from pathlib import Path

import torch
from accelerate.utils import reduce

from isotune.doctor.checks import (
    NOTE,
    OK,
    WRONG,
    Finding,
    caches,
    compilers,
    device,
    disk,
    hub,
    kernels,
    scheduler,
    versions,
)
from isotune.evaluation.distributed_eval import Ranks, start_ranks

MESSAGE_BYTES = 64 * 2**20
SLOW_BYTES_PER_SECOND = 1e8
ROUNDS = 3


def run_doctor(output: Path) -> int:
    """Examine, and print one table on the main process.

    Returns:
        the exit status: 1 where something is wrong on any process, else 0.
    """
    ranks = start_ranks()
    everywhere = ranks.gather({ranks.rank: [*run_checks(output), *between(ranks)]}, ranks.world_size)
    if ranks.is_main:
        print(table(everywhere))
    return int(any(finding.verdict == WRONG for findings in everywhere.values() for finding in findings))


def run_checks(output: Path) -> list[Finding]:
    """Everything that a process can see by itself."""
    looked_at = (versions(), device(), kernels(), compilers(), disk(output), caches(), hub(), scheduler())
    return [finding for findings in looked_at for finding in findings]


def between(ranks: Ranks) -> list[Finding]:
    """The bandwidth of an all-reduce between the processes, best of three, as bytes that leave a process."""
    if ranks.world_size == 1:
        return []
    message = torch.ones(MESSAGE_BYTES // 4, device=ranks.device)
    best = float("inf")
    total = message
    for _ in range(ROUNDS + 1):  # the first makes connections
        started = time.perf_counter()
        total = reduce(message, reduction="sum")
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    if float(total[0]) != ranks.world_size:  # type: ignore[index]
        return [Finding(WRONG, "all-reduce", f"the sum of ones is {float(total[0])}", "gradients would be wrong",  # type: ignore[index]
                        "check the network; NCCL_DEBUG=INFO")]  # fmt: skip
    rate = 2 * (ranks.world_size - 1) / ranks.world_size * MESSAGE_BYTES / best
    said = f"{ranks.world_size} processes, {rate / 1e9:.2f} GB/s"
    if rate < SLOW_BYTES_PER_SECOND:
        return [Finding(NOTE, "all-reduce", said, "steps would wait for gradients", "name the fast network interface: "
                        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME")]  # fmt: skip
    return [Finding(OK, "all-reduce", said)]


def table(everywhere: dict[int, list[Finding]]) -> str:
    """One line a finding; what several processes found alike stands once, with their ranks."""
    ranks_of: dict[tuple[str, str, str, str, str], list[int]] = {}
    for rank, findings in everywhere.items():
        for f in findings:
            # clocks differ from rank to rank: the first one's figure stands for all
            alike = next((k for k in ranks_of if k[:2] == (f.verdict, f.subject) and f.verdict == OK), None)
            key = alike or (f.verdict, f.subject, f.found, f.why, f.remedy)
            ranks_of.setdefault(key, []).append(rank)
    lines = []
    for (verdict, subject, found, why, remedy), ranks in ranks_of.items():
        where = "" if len(set(ranks)) == len(everywhere) else f" (rank {', '.join(map(str, sorted(set(ranks))))})"
        matters = f": {why}; {remedy}" if why else ""
        lines.append(f"{verdict:<6}{subject:<16}{found}{where}{matters}")
    wrong = sum(line.startswith(WRONG) for line in lines)
    lines.append(f"{wrong} wrong, {sum(line.startswith(NOTE) for line in lines)} to note")
    return "\n".join(lines)
