"""What each learning rate schedule takes in lr_scheduler_kwargs: the engine would say it only after minutes."""

from isotune.config.schema import Values

# By schedule: names of which exactly one must be given, and names that may be given.
SCHEDULE_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "constant": ((), ()),
    "constant_with_warmup": ((), ()),
    "cosine": ((), ("num_cycles",)),
    "cosine_with_restarts": ((), ("num_cycles",)),
    "polynomial": ((), ("lr_end", "power")),
    "inverse_sqrt": ((), ("timescale",)),
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), ("num_cycles",)),
    "cosine_warmup_with_min_lr": (("min_lr", "min_lr_rate"), ("num_cycles", "warmup_lr_rate")),
    "warmup_stable_decay": (
        ("num_decay_steps",),
        ("num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}


def is_wrongly_called(values: Values) -> bool:
    """Whether lr_scheduler_kwargs has a name that the schedule does not take, or lacks what it needs."""
    needed, optional = SCHEDULE_ARGUMENTS[values["lr_scheduler_type"]]
    given = set(values["lr_scheduler_kwargs"] or {})
    return bool(given - {*needed, *optional}) or bool(needed and len(given & set(needed)) != 1)


def arguments_in_words(values: Values) -> str:
    """What the schedule of these values takes."""
    schedule = values["lr_scheduler_type"]
    needed, optional = SCHEDULE_ARGUMENTS[schedule]
    parts = [f"needs {'one of ' if len(needed) > 1 else ''}{', '.join(needed)}"] if needed else []
    parts.append(f"takes {', '.join(optional)}" if optional else "takes no arguments")
    return f"{schedule} {' and '.join(parts)}"
