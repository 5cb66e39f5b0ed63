"""Randomness is counted, not carried: what a microbatch draws depends on its place in the plan and on nothing else."""

import hashlib

import torch


def microbatch_seed(seed: int, step: int, number: int) -> int:
    """A 63-bit seed from (seed, step, microbatch number), without collisions between neighbours."""
    digest = hashlib.blake2b(f"{seed}/{step}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_microbatch(seed: int, step: int, number: int) -> None:
    """Seed the generators that dropout draws from, on every device, before a microbatch's forward pass."""
    torch.manual_seed(microbatch_seed(seed, step, number))
