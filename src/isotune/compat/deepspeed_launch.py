"""DeepSpeed 0.19: what has to be switched off before its first start on CPUs."""


def disable_shm_transport() -> None:
    """Let gloo carry collectives between CPU processes, instead of a transport that DeepSpeed compiles itself.

    DeepSpeed builds it at its first start, which needs a compiler. A process that is killed during the build leaves a
    lock behind (torch's FileBaton), and every later start of this user waits for that lock forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
