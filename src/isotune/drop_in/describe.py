"""What is guaranteed of a trainer's result, and what its own code takes away."""

from typing import Any

from isotune.drop_in.fields import FIELDS, without_effect

# methods of the libraries that a subclass may have of its own
OWN_METHODS = {
    "training_step": "training_step is your own: nothing is known of its updates, each of which is one of its inputs",
    "evaluation_loop": "evaluation_loop is your own: nothing is known of its numbers",
    "prediction_step": "prediction_step is your own, and is not called: predict() has one prediction a row",
    "_prepare_inputs": "_prepare_inputs is your own, and is not called: the schedule lays out what the model is given",
    "compute_loss_context_manager": "compute_loss_context_manager is your own, and is not called",
}


def describe(trainer: Any) -> str:
    """What is guaranteed of a trainer's result, a line each, to be printed."""
    plan = trainer.plan
    launch = f"{trainer.args.world_size} process{'es' if trainer.args.world_size > 1 else ''}"
    bits = "bit for bit" if plan.exact_gradients else "to rounding"
    losses = f"the sum over the update's {plan.task.target.replace('_', ' ')}, divided once by their number"
    if trainer.own_loss is not None:
        way = "a sum over rows" if trainer.own_loss.adds_up else "once of all its logits, by a second forward pass"
        losses = f"your own compute_loss over the global batch, {way}"
    packed = "no document sees another"
    lines = [
        f"an update   {plan.schedule.global_batch_size} rows, on this launch of {launch} and on any other",
        f"losses      {losses}",
        f"gradients   the same on any number of processes, {bits}",
        "dropout     of the document: not of its neighbours, its microbatch or its rank",
        f"attention   {plan.task.attention}: {packed}",
        *(f"not exact   {line}" for line in not_exact(trainer)),
    ]
    if nothing := without_effect(trainer.given_args):
        lines.append(f"no effect   {', '.join(nothing)}")
    return "\n".join(lines)


def not_exact(trainer: Any) -> list[str]:
    """What is honoured, and is not the same on every launch; and what is not called."""
    args = trainer.args
    found = [line for name, line in OWN_METHODS.items() if _is_own(type(trainer), name)]
    if args.train_sampling_strategy not in ("random", "sequential"):
        found.append(f"train_sampling_strategy: {args.train_sampling_strategy}: rows are shuffled; none is padded")
    if getattr(args, "torch_compile", False):
        found.append(f"torch_compile: {FIELDS['torch_compile'].note}")
    return found


def _is_own(kind: type, name: str) -> bool:
    """Whether a method is neither the libraries' nor ours."""
    owner = next(parent for parent in kind.__mro__ if name in vars(parent))
    return not owner.__module__.startswith(("transformers.", "trl.", "isotune."))
