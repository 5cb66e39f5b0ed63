"""Evaluation of a classifier: `isotune eval`, eval/classify.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from isotune.commands.before_torch import before_torch
from isotune.commands.trained.flags import (
    add_data_flags,
    add_launch_flags,
    check_counts,
    find_task,
    model_parser,
    timeouts_of,
)
from isotune.config.layers import read_file
from isotune.config.recipes import LabelSource, project_of
from isotune.io.errors import UserError
from isotune.io.run_files import LOGS_DIR, RECIPE


def read_arguments(argv: Sequence[str], *, prog: str, description: str) -> argparse.Namespace:
    """A command line of the flags below; UserError says what is wrong with it."""
    parser = model_parser(prog, description, "classifier")
    data = parser.add_argument_group("data (by default the evaluation data of the run)")
    data.add_argument("--task", metavar="FILE", help="a task file or the name of a shipped one; flags win over it")
    data.add_argument("--dataset_name", metavar="NAME", help="a Hub id, folder, file or builtin:NAME")
    data.add_argument("--dataset_split", metavar="SPLIT", help="of that data set (test)")
    add_data_flags(data)
    data.add_argument("--dataset_text_field", metavar="COLUMN", help="holds the texts (the run's, else text)")
    data.add_argument("--dataset_text_pair_field", metavar="COLUMN", help="holds the second texts of pairs (none)")
    data.add_argument("--dataset_label_field", metavar="COLUMN", help="holds the classes (the run's, else label)")
    data.add_argument("--dataset_id_field", metavar="COLUMN", help="names each row; none: row numbers do (id)")
    data.add_argument(
        "--label_source",
        choices=get_args(LabelSource),
        help="where the classes come from (the run's own for its own data, else column)",
    )
    data.add_argument(
        "--ordinal", action="store_true", default=None, help="the classes are ordered: metrics of distance too"
    )
    data.add_argument(
        "--label_thresholds",
        nargs="+",
        type=float,
        metavar="X",
        help="from which probability a text has a label, one number or one for each (the model's own, or 0.5)",
    )
    data.add_argument("--max_seq_length", type=int, metavar="N", help="tokens of a text (the run's own, or 512)")
    data.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    how = parser.add_argument_group("computation (the first three change metrics by rounding only)")
    how.add_argument("--batch_tokens", type=int, metavar="N", help="of one forward (4096 on a CPU, else 65536)")
    how.add_argument("--batch_size", type=int, metavar="N", help="texts of one forward at most")
    how.add_argument("--bf16", action="store_true", help="bf16 instead of fp32, faster where the device has it")
    draws = "of the bootstrap intervals; a share of rows that is 0 or 1 has an exact one (%(default)s)"
    how.add_argument("--resamples", type=int, default=2000, metavar="N", help=draws)
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (%(default)s)")
    add_launch_flags(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", metavar="DIR", help="where the files go (RUN/eval/NAME; runs/MODEL/eval/NAME)")
    out.add_argument(
        "--attention_ids", nargs="*", metavar="ID", help="rows whose attention is drawn (three short ones)"
    )
    out.add_argument("--no_pictures", action="store_true", help="no plots")
    given = parser.parse_args(argv)
    find_task(given)
    check_counts(given, ("limit", "batch_tokens", "batch_size", "resamples", "max_seq_length"))
    if given.seed < 0:
        raise UserError(f"--seed is {given.seed}: it is 0 or a positive number")
    for threshold in given.label_thresholds or ():
        if not 0 < threshold < 1:
            raise UserError(f"--label_thresholds holds {threshold:g}: a threshold is between 0 and 1")
    given.timeouts = timeouts_of(given, given.run_dir)
    return given


def evaluate_classifier(given: argparse.Namespace) -> None:
    """Model, rows, predictions on all processes; scores, files and plots on one."""
    before_torch()
    from isotune.evaluation.tasks import FLAGS, ClassificationTask, read_task

    flags = {name: getattr(given, name) for name in FLAGS}
    is_project = bool(given.run_dir) and _is_project(Path(given.run_dir), given)
    task = read_task(ClassificationTask, given.task, flags) if given.task or given.dataset_name or given.model else None
    # torch takes seconds to import, so mistakes on the command line are answered before
    from isotune.evaluation.distributed_eval import start_ranks

    ranks = start_ranks(**given.timeouts)
    with ranks.supervised(Path(given.output_dir or _home(given)) / LOGS_DIR / "eval-rank"):
        _evaluate(given, ranks, task, flags, is_project=is_project)


def _home(given: argparse.Namespace) -> Path:
    return Path(given.run_dir or Path("runs") / Path(given.model).name)


def _evaluate(given: argparse.Namespace, ranks: Any, task: Any, flags: dict[str, Any], *, is_project: bool) -> None:
    import torch

    from isotune.evaluation.classification.attention_plots import draw_attention
    from isotune.evaluation.classification.evaluate import (
        evaluate_rows,
        read_task_rows,
        write_evaluation,
    )
    from isotune.evaluation.classification.examples import print_examples
    from isotune.evaluation.classification.plots import draw_plots
    from isotune.evaluation.classification.task_columns import with_columns
    from isotune.evaluation.models import load_model_classifier, load_run_classifier, task_of_run
    from isotune.evaluation.results import claim_folder, named_identity, score_lines
    from isotune.report.loss_curve import draw_loss_curve
    from isotune.run.metrics_file import METRICS

    dtype = torch.bfloat16 if given.bf16 else torch.float32
    load, name = (load_run_classifier, given.run_dir) if given.run_dir else (load_model_classifier, given.model)
    classifier = load(name, ranks.device, dtype)
    battles = None
    if is_project:
        from isotune.projects.arena.evaluate import battle_rows

        battles = battle_rows(classifier, given.dataset_name, given.limit)
        task, rows = battles.task, battles.rows
    else:
        held_out = None
        if task is None:
            task, held_out = task_of_run(classifier, flags)
        task, notes = with_columns(task, classifier)
        rows = read_task_rows(task, classifier, ranks, given.limit, held_out, notes)
    home = _home(given)
    settings: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "resamples": given.resamples}
    evaluation_of = {
        **task.decisive(),
        **settings,
        "data": rows.fingerprint,
        "limit": given.limit,
        "seed": given.seed,
        **named_identity(given.run_dir, given.model, given.output_dir),
    }
    wanted = Path(given.output_dir or home / "eval" / (battles.name if battles else task.name))
    claim_folder(wanted, evaluation_of, is_named=bool(given.output_dir), write=False)  # refused before the work
    attention_rows = None if given.attention_ids is None else rows.find(given.attention_ids)
    draws: dict[str, int] = {"resamples": given.resamples, "seed": given.seed}
    if battles is not None:
        evaluation = battles.evaluate(classifier, ranks, **draws)
    else:
        sizes = {"batch_tokens": given.batch_tokens, "batch_size": given.batch_size}
        evaluation = evaluate_rows(classifier, rows, task, ranks, **sizes, **draws)
    if evaluation is None:
        return
    folder = claim_folder(wanted, evaluation_of, is_named=bool(given.output_dir))
    if not given.no_pictures:
        draw_plots(evaluation, folder)
        draw_attention(classifier, evaluation, folder, attention_rows)
    write_evaluation(evaluation, folder, classifier, task, settings)
    if not given.no_pictures and given.run_dir and (home / METRICS).is_file():
        print(f"loss curve  {draw_loss_curve(home)}")
    print_examples(evaluation.task_type, evaluation.examples)
    print("\n".join(score_lines(evaluation.scores)))
    print(f"written to {folder}")


def _is_project(run: Path, given: argparse.Namespace) -> bool:
    """Whether it is a run of the Arena; UserError for what cannot be evaluated of one."""
    keys = read_file(run / RECIPE).given if (run / RECIPE).is_file() else {}
    if project_of(keys) is None:
        return False
    if keys["method"] != "encoder":
        raise UserError(
            f"{run} is a run of baselines, which {run / 'eval'} has the evaluations of: isotune predict predicts others"
        )
    from isotune.evaluation.tasks import FLAGS

    unused = [name for name in (*FLAGS, "task", "batch_size", "batch_tokens") if name != "dataset_name"]
    if named := next((name for name in unused if getattr(given, name) is not None), None):
        raise UserError(f"--{named} has no effect: the Arena's files have their own columns, classes and lengths")
    return True
