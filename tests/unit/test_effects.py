"""A setting that a run is too short for is named, by the run and by the plan."""

import pytest
import torch
from transformers import get_scheduler

from isotune.config import ClassificationRecipe, Recipe
from isotune.config.effects import count_events, settings_without_effect
from isotune.io.errors import UserError

EPOCH = 10  # steps


def sentences(steps: int, kind=Recipe, **values) -> list[str]:
    given = {"model_name_or_path": "builtin:opt-tiny", "dataset_name": "builtin:capitals", "output_dir": "run"}
    return settings_without_effect(kind.from_values(**given, **values), steps, EPOCH)


def rates(steps: int, **values) -> list[float]:
    """The learning rates of all steps, by transformers' scheduler stepped one by one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=values["learning_rate"])
    warmup = values["warmup_steps"]
    scheduler = get_scheduler(
        values["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=-int(-warmup * steps // 1) if warmup < 1 else warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=values.get("lr_scheduler_kwargs"),
    )
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


SCHEDULES = [
    ("linear", None),
    ("cosine", None),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", None),
    ("constant_with_warmup", None),
    ("inverse_sqrt", None),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 2}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
@pytest.mark.parametrize(("warmup", "steps"), [(100, 4), (4, 4), (3, 4), (0.9, 4), (0.25, 40), (1, 5)])
def test_a_rate_that_is_never_reached_is_named_with_the_highest_one(name, options, warmup, steps):
    values = {"learning_rate": 1e-3, "lr_scheduler_type": name, "warmup_steps": warmup}
    values |= {"lr_scheduler_kwargs": options} if options else {}
    if name == "polynomial" and warmup in (4, 0.9):  # which ends in a division by zero after the last step
        with pytest.raises(UserError, match="warmup_steps is 4, all steps of the run"):
            sentences(steps, **values)
        return
    highest = max(rates(steps, **values))
    said = [sentence for sentence in sentences(steps, **values) if "warmup_steps" in sentence]
    assert bool(said) == (highest < 1e-3 * (1 - 1e-9))
    assert all(f" {highest:.3g} at most" in sentence and "learning_rate 0.001" in sentence for sentence in said)


def test_a_polynomial_that_would_not_fall_is_refused():
    with pytest.raises(UserError, match="polynomial takes a number from 0 and below learning_rate for lr_end"):
        sentences(5, lr_scheduler_type="polynomial", learning_rate=1e-3, lr_scheduler_kwargs={"lr_end": 0.01})


@pytest.mark.parametrize(
    ("values", "steps", "says"),
    [
        ({"learning_rate": 0}, 5, "learning_rate is 0"),
        ({"save_steps": 50}, 5, "save_steps is 50 and the run has 5 steps: the only checkpoint"),
        ({"logging_steps": 50, "report_to": ["tensorboard"]}, 5, "logging_steps is 50"),
        ({"eval_steps": 50}, 5, "eval_steps is 50 and the run has 5 steps: it evaluates at the end only"),
        ({"eval_steps": 1, "eval_delay": 9}, 5, "evaluates never, because eval_delay is 9"),
        ({"early_stopping_patience": 3, "eval_steps": 5}, 12, "early_stopping_patience is 3 and the run of 12 steps"),
        ({"early_stopping_patience": 1, "eval_strategy": "epoch"}, 10, "evaluates once: it cannot end early"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, 7, "load_best_model_at_end has nothing to choose"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5,
             "num_stable_steps": 20}}, 12, "begins after 20 steps, and the run has 12",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 50}}, 12,
            "ends after 50 steps, and the run has 12",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_run_is_too_short_for_is_named(values, steps, says):
    if any(name in str(values) for name in ("eval", "best", "stopping")):
        values = {"eval_dataset_name": "builtin:capitals", **values}
    assert any(says in sentence for sentence in sentences(steps, **values)), sentences(steps, **values)
    assert sentences(1000, **{**values, "learning_rate": 1e-3}) == []  # which is long enough for all of them


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "cosine",
            {"num_cycles": 0},
            "with lr_scheduler_kwargs {'num_cycles': 0} lr_scheduler_type cosine never lowers",
        ),
        ("polynomial", {"power": 0}, "never lowers the learning rate"),
        ("warmup_stable_decay", {"num_decay_steps": 0}, "never lowers the learning rate"),
        ("warmup_stable_decay", {"num_decay_steps": 4, "warmup_type": "cosine"}, "has warmup_type, and without"),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}, "has warmup_lr_rate, and without"),
    ],
)
def test_options_of_a_schedule_that_change_nothing_are_named(name, options, says):
    values = {"learning_rate": 1e-3, "lr_scheduler_type": name, "lr_scheduler_kwargs": options, "warmup_steps": 0}
    said = sentences(12, **values)
    assert len(said) == 1 and says in said[0]
    if "never" in says:
        assert len(set(rates(12, **values))) == 1
    assert sentences(12, **{**values, "warmup_steps": 3}) == ([] if "without" in says else said)


@pytest.mark.parametrize(("name", "options"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
def test_schedules_that_fall_are_not_blamed(name, options):
    values = {"learning_rate": 1e-3, "lr_scheduler_type": name, "warmup_steps": 2}
    assert sentences(20, **values, **({"lr_scheduler_kwargs": options} if options else {})) == []


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-2}, "takes a number from 0 and below learning_rate for min_lr"),
        ("cosine_with_min_lr", {"min_lr": 1e-3}, "takes a number from 0 and below learning_rate for min_lr"),
        ("polynomial", {"lr_end": 1e-3}, "takes a number from 0 and below learning_rate for lr_end"),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 1}, "takes a share of learning_rate, from 0 and below 1, for"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "min_lr_ratio": 2}, "from 0 and below 1, for min_lr_ratio"),
        ("cosine_with_min_lr", {"min_lr_rate": -0.1}, "from 0 and below 1, for min_lr_rate"),
        ("cosine", {"num_cycles": "many"}, "cosine takes a number of at least 0 for num_cycles"),
        ("cosine", {"num_cycles": -1}, "cosine takes a number of at least 0 for num_cycles"),
        ("cosine", {"num_cycles": True}, "cosine takes a number of at least 0 for num_cycles"),
        ("polynomial", {"power": -1}, "takes a number of at least 0 for power"),  # the rate would rise
        ("inverse_sqrt", {"timescale": 0}, "takes a number above 0 for timescale"),
        ("warmup_stable_decay", {"num_decay_steps": "x"}, "takes a number of steps for num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "exp"}, "linear, cosine or 1-sqrt for decay_type"),
    ],
)
def test_an_option_that_the_schedule_would_fail_or_rise_with_is_refused(name, options, says):
    with pytest.raises(UserError, match=says):
        sentences(5, lr_scheduler_type=name, learning_rate=1e-3, lr_scheduler_kwargs=options)


@pytest.mark.parametrize("kind", [Recipe, ClassificationRecipe])
def test_a_batch_larger_than_the_data_is_named(kind):
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "run", "global_batch_size": 16}
    recipe = kind.from_values(**given)
    says = ["global_batch_size is 16, and a step sees all 15 rows"]
    assert settings_without_effect(recipe, 3, 1, 15) == says and settings_without_effect(recipe, 3, 1, 16) == []


def test_defaults_are_not_blamed():
    assert sentences(1) == []
    assert sentences(3, ClassificationRecipe, eval_dataset_name="builtin:capitals") == []


@pytest.mark.parametrize("steps", [1, 7, 10, 25])
@pytest.mark.parametrize("every", [1, 4, 0.3, 100])
def test_evaluations_are_counted_as_transformers_flow_does_them(steps, every):
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import DefaultFlowCallback

    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "run", "eval_dataset_name": "e"}
    recipe = Recipe.from_values(**given, eval_steps=every, eval_delay=2)
    arguments = TrainingArguments("run", eval_strategy="steps", eval_steps=every, eval_delay=2, use_cpu=True)
    state = TrainerState(max_steps=steps)
    state.compute_steps(arguments, steps)
    times = 0
    for state.global_step in range(1, steps + 1):
        times += DefaultFlowCallback().on_step_end(arguments, state, TrainerControl()).should_evaluate
    assert count_events(recipe, "eval", steps, EPOCH) == times


@pytest.mark.parametrize(("optim", "text"), [("adamw_torch", "eps=1e-6"), ("sgd", "momentun=0.9"), ("sgd", "eps=1")])
def test_an_argument_that_the_optimiser_passes_over_is_refused(optim, text):
    with pytest.raises(UserError, match=rf"optim_args \({text}\) and .*{optim} takes "):
        sentences(5, optim=optim, optim_args=text)
    assert sentences(5, optim="sgd", optim_args="momentum=0.9,nesterov=true") == []
