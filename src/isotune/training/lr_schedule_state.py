"""The learning rate's schedule and fp16's loss scale, in numbers that JSON holds, under every engine."""

from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from isotune.io.errors import RunFault

SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed 0.19


def capture(trainer: Any) -> dict[str, Any]:
    """What the scheduler and the loss scaler know after a step."""
    return {"scheduler": _scheduler(trainer).state_dict(), "scaler": _capture_scaler(trainer)}


def restore(trainer: Any, state: dict[str, Any]) -> None:
    """Put it back, and the learning rate into the optimizer's groups; RunFault for a schedule of another kind."""
    scheduler = _scheduler(trainer)
    wanted = scheduler.state_dict()
    if wanted.keys() != state["scheduler"].keys():
        raise RunFault(f"the checkpoint's schedule does not fit {type(scheduler).__name__}")
    rates = state["scheduler"]["_last_lr"]
    groups = scheduler.optimizer.param_groups
    # an engine may split the groups in another way; a schedule gives all of them the same factor of the same rate
    if len(rates) != len(groups):
        if len(set(rates)) != 1:
            raise RunFault(f"the checkpoint has {len(rates)} parameter groups, and the optimizer {len(groups)}")
        rates = rates[:1] * len(groups)
    # what belongs to a group is the recipe's own: its highest rate, and the function of the step
    own = {name: wanted[name] for name in ("base_lrs", "lr_lambdas") if name in wanted}
    scheduler.load_state_dict({**state["scheduler"], "_last_lr": rates, **own})
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    _restore_scaler(trainer, state["scaler"])


def _scheduler(trainer: Any) -> LRScheduler:
    scheduler = trainer.lr_scheduler
    while not isinstance(scheduler, LRScheduler):
        scheduler = scheduler.scheduler  # accelerate's and DeepSpeed's wrappers
    return scheduler


def _capture_scaler(trainer: Any) -> dict[str, Any] | None:
    if trainer.accelerator.scaler is not None:
        state = trainer.accelerator.scaler.state_dict()
        return {"scale": state.get("scale"), "torch": state} if state else None
    if (scaler := _deepspeed_scaler(trainer)) is None:
        return None
    return {"scale": scaler.cur_scale, "deepspeed": {k: getattr(scaler, k) for k in SCALER_KEYS if hasattr(scaler, k)}}


def _restore_scaler(trainer: Any, state: dict[str, Any] | None) -> None:
    """The scaler's whole state, or from another engine's only its scale."""
    if state is None:
        return
    if trainer.accelerator.scaler is not None:
        own = trainer.accelerator.scaler.state_dict()
        trainer.accelerator.scaler.load_state_dict(state.get("torch", {**own, "scale": state["scale"]}))
    elif (scaler := _deepspeed_scaler(trainer)) is not None:
        for name, value in state.get("deepspeed", {"cur_scale": state["scale"]}).items():
            setattr(scaler, name, value)


def _deepspeed_scaler(trainer: Any) -> Any:
    if not (trainer.is_deepspeed_enabled and trainer.args.fp16):
        return None
    return getattr(trainer.model_wrapped.optimizer, "loss_scaler", None)
