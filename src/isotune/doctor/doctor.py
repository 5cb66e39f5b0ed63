"""`isotune doctor`: check a machine on every process of a launch, and print one table."""

import time
from pathlib import Path
from typing import Any

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
    """Run all checks on every process, and print one table on the main process.

    Returns:
        the exit status: 1 if anything is WRONG on any process, otherwise 0.
    """
    ranks = start_ranks()
    findings_of = ranks.gather({ranks.rank: [*run_checks(output), *check_all_reduce(ranks)]}, ranks.world_size)
    if ranks.is_main:
        print(format_table(findings_of))
    return int(any(finding.status == WRONG for findings in findings_of.values() for finding in findings))


def run_checks(output: Path) -> list[Finding]:
    """All checks that need one process."""
    checks = (versions(), device(), kernels(), compilers(), disk(output), caches(), hub(), scheduler())
    return [finding for findings in checks for finding in findings]


def check_all_reduce(ranks: Ranks) -> list[Finding]:
    """The bandwidth of an all-reduce: bytes that a process sends per second, the best of three rounds."""
    if ranks.world_size == 1:
        return []
    message = torch.ones(MESSAGE_BYTES // 4, device=ranks.device)
    best_seconds = float("inf")
    total: Any = message
    for _ in range(ROUNDS + 1):  # the first round opens the connections
        started = time.perf_counter()
        total = reduce(message, reduction="sum")
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        best_seconds = min(best_seconds, time.perf_counter() - started)
    if float(total[0]) != ranks.world_size:
        return [Finding(WRONG, "all-reduce", f"the sum of ones is {float(total[0])}", "gradients would be wrong",
                        "check the network; NCCL_DEBUG=INFO")]  # fmt: skip
    rate = 2 * (ranks.world_size - 1) / ranks.world_size * MESSAGE_BYTES / best_seconds
    result = f"{ranks.world_size} processes, {rate / 1e9:.2f} GB/s"
    if rate < SLOW_BYTES_PER_SECOND:
        fix = "name the fast network interface in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        return [Finding(NOTE, "all-reduce", result, "steps would wait for gradients", fix)]
    return [Finding(OK, "all-reduce", result)]


def format_table(findings_of: dict[int, list[Finding]]) -> str:
    """One line per finding, with its ranks; findings that several ranks share appear once."""
    ranks_of: dict[tuple[str, str, str, str, str], list[int]] = {}
    for rank, findings in findings_of.items():
        for f in findings:
            # times differ between ranks: the first rank's result represents all
            same_check = next((k for k in ranks_of if k[:2] == (f.status, f.subject) and f.status == OK), None)
            key = same_check or (f.status, f.subject, f.result, f.consequence, f.fix)
            ranks_of.setdefault(key, []).append(rank)
    lines = []
    for (status, subject, result, consequence, fix), ranks in ranks_of.items():
        where = "" if len(set(ranks)) == len(findings_of) else f" (rank {', '.join(map(str, sorted(set(ranks))))})"
        explanation = f": {consequence}; {fix}" if consequence else ""
        lines.append(f"{status:<6}{subject:<16}{result}{where}{explanation}")
    wrong = sum(line.startswith(WRONG) for line in lines)
    lines.append(f"{wrong} wrong, {sum(line.startswith(NOTE) for line in lines)} to note")
    return "\n".join(lines)
