"""Generation with a model, evaluated, for one question or as a chat: `isotune eval`, `chat`, eval/generate.py."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isotune.commands.before_torch import before_torch
from isotune.commands.trained.flags import (
    add_data_flags,
    add_launch_flags,
    check_counts,
    find_task,
    model_parser,
    timeouts_of,
)
from isotune.io.errors import UserError, is_first_process
from isotune.io.extras import need
from isotune.io.run_files import LOGS_DIR


def read_arguments(argv: Sequence[str], *, prog: str, description: str) -> argparse.Namespace:
    """A command line of the flags below; UserError says what is wrong with it."""
    parser = model_parser(prog, description, "model")
    parser.add_argument(
        "--dataset_name", metavar="NAME", help="evaluate on the first question of each of its conversations"
    )
    parser.add_argument("--dataset_split", metavar="SPLIT", help="of that data set (test)")
    add_data_flags(parser)
    parser.add_argument("--dataset_text_field", metavar="COLUMN", help="holds the conversations (found by its name)")
    parser.add_argument("--dataset_prompt_field", metavar="COLUMN", help="or holds the questions, and ...")
    parser.add_argument("--dataset_completion_field", metavar="COLUMN", help="... this one their answers")
    parser.add_argument("--task", metavar="YAML", help="or a task file or the name of a shipped one; flags win over it")
    parser.add_argument(
        "--allow_dropped", action="store_true", default=None, help="go on where most rows hold no question and answer"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N samples only")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="prompts of one forward (%(default)s)")
    parser.add_argument("--output_dir", metavar="DIR", help="where the result goes (RUN/eval/NAME of the data set)")
    parser.add_argument(
        "--judge", metavar="WHO", help="prefers one of two answers: a run, a model, a server's address or a command"
    )
    parser.add_argument(
        "--judge_against",
        metavar="WHAT",
        help="what the answers are judged beside: a run with stored answers (reference)",
    )
    parser.add_argument("--judge_model", metavar="NAME", help="of a judge that is a server (its first one)")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one question")
    parser.add_argument("--interactive", action="store_true", help="a chat, as without --prompt and --dataset_name")
    parser.add_argument("--lm_eval_tasks", metavar="A,B", help="tasks of lm-evaluation-harness: YAML files or names")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest completion (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling and intervals (%(default)s)")
    add_launch_flags(parser)
    given = parser.parse_args(argv)
    find_task(given)
    given.evaluates = given.dataset_name or given.task
    modes = {"--prompt": given.prompt is not None, "--task" if given.task else "--dataset_name": given.evaluates}
    modes |= {"--interactive": given.interactive, "--lm_eval_tasks": given.lm_eval_tasks}
    if sum(map(bool, modes.values())) > 1:
        raise UserError(f"{' and '.join(name for name, on in modes.items() if on)} exclude each other")
    check_counts(given, ("batch_size", "limit"))
    if given.judge and not given.evaluates:
        raise UserError("--judge judges the answers of an evaluation: give --dataset_name or --task too")
    for flag in ("judge_against", "judge_model"):
        if getattr(given, flag) and not given.judge:
            raise UserError(f"--{flag} has no effect without --judge")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not given.evaluates and given.prompt is None:
        what = "--lm_eval_tasks takes" if given.lm_eval_tasks else "a chat takes"
        raise UserError(f"{what} one process: start it with python and without a launcher")
    given.name, given.timeouts = given.run_dir or given.model, timeouts_of(given, given.run_dir)
    return given


def generate(given: argparse.Namespace) -> None:
    """Load the model; evaluate, answer or chat."""
    before_torch(quiet=given.prompt is not None)  # the answer is all that is printed
    # torch takes seconds to import, so mistakes on the command line are answered before
    from isotune.evaluation.distributed_eval import read_shards, start_ranks
    from isotune.evaluation.generation.base_rules import rules_of_base
    from isotune.evaluation.generation.chat import answer, run_chat
    from isotune.evaluation.generation.completion import Decoding
    from isotune.evaluation.generation.evaluate import (
        evaluate_generation,
        print_generation_result,
        write_generation_result,
    )
    from isotune.evaluation.generation.lm_eval_bridge import check_tasks, content_of_task, run_tasks, write_harness
    from isotune.evaluation.judging.judgement import judge_answers, plan_judging
    from isotune.evaluation.judging.judges import check_judge
    from isotune.evaluation.models import data_of_run, generation_model_named, generation_model_of_run
    from isotune.evaluation.results import score_lines
    from isotune.evaluation.tasks import DEFAULT_MAX_NEW_TOKENS, ROW_COLUMNS, GenerationTask, read_task

    keys = ("dataset_name", "dataset_split", "dataset_config", "dataset_revision", "dataset_columns")
    flags = {key: getattr(given, key) for key in (*keys, "allow_dropped", "max_new_tokens", *ROW_COLUMNS)}
    if given.run_dir and given.dataset_name:
        own = data_of_run(given.run_dir, given.dataset_name)
        names_columns = any(flags[key] for key in ROW_COLUMNS)  # which replace all of the run's
        flags |= {k: v for k, v in own.items() if flags.get(k) is None and not (names_columns and k in ROW_COLUMNS)}
    if given.evaluates:
        need("sacrebleu", "an evaluation of answers")
        need("rouge_score", "an evaluation of answers")
    task = read_task(GenerationTask, given.task, flags) if given.evaluates else None
    longest = DEFAULT_MAX_NEW_TOKENS if given.max_new_tokens is None else given.max_new_tokens
    decoding = Decoding(task.max_new_tokens if task else longest, given.temperature, given.top_p, given.seed)
    tasks = check_tasks(given.lm_eval_tasks) if given.lm_eval_tasks else []
    samples = task.samples(given.limit, show=is_first_process()) if task else None
    judging = (
        plan_judging(given.judge, given.judge_model, given.judge_against, samples) if given.judge and samples else None
    )
    if judging and is_first_process():
        check_judge(given.judge, given.judge_model)
    name, evaluation = "lm_eval", dict[str, Any]()  # what decides the result
    if task and samples:
        name, evaluation = task.name, {**task.decisive(), "data": samples.fingerprint, "decoding": asdict(decoding)}
        evaluation |= judging.decisive() if judging else {}
    elif tasks:
        evaluation = {"dataset_name": ",".join(tasks), "data": [content_of_task(one) for one in tasks]}
    if evaluation:
        result_folder(given, name, evaluation, write=False)  # refused before the work
    shards = read_shards()
    ranks = start_ranks(**given.timeouts)
    home = given.output_dir or given.run_dir
    with ranks.supervised(Path(home, LOGS_DIR, "eval-rank") if home and given.evaluates else None):
        load = generation_model_of_run if given.run_dir else generation_model_named
        lm = load(given.name, ranks.device, shards)
        if (rules := rules_of_base(lm.model)) and ranks.is_main:
            ruled = ", ".join(f"{name} {value}" for name, value in rules.items())
            print(f"note: not in effect, of the model's generation_config.json: {ruled}", file=sys.stderr)
        if task and samples:
            result = evaluate_generation(
                lm, samples, decoding, ranks, batch_size=given.batch_size, metrics=task.metrics
            )
            del lm  # a judge may be as large
            judgement = judge_answers(judging, result.predictions, ranks, decoding.seed) if judging else None
            if judgement:
                result = result.with_judgement(judgement.scores, judgement.of_rows, judgement.facts)
            if ranks.is_main:
                print_generation_result(result, samples)
                if folder := result_folder(given, name, evaluation):
                    write_generation_result(
                        result, folder, model=given.name, task=task, samples=samples, decoding=decoding
                    )
                    print(f"written to {folder}")
        elif tasks:
            scores, predictions = run_tasks(lm, tasks, limit=given.limit, batch_size=given.batch_size)
            print("\n".join(score_lines(scores)))
            if folder := result_folder(given, name, evaluation):
                write_harness(scores, predictions, folder, model=given.name, tasks=tasks)
                print(f"written to {folder}")
        elif given.prompt is not None:
            text = answer(lm, given.prompt, decoding)
            if ranks.is_main:
                print(text)
        else:
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  (a TextIOWrapper)
            run_chat(lm, decoding, name=given.name)


def result_folder(
    given: argparse.Namespace, name: str, evaluation: dict[str, Any], *, write: bool = True
) -> Path | None:
    """Where the result goes; None for a model without a run, unless --output_dir names it."""
    from isotune.evaluation.results import claim_folder, named_identity

    if not given.output_dir and not given.run_dir:
        return None
    identity = named_identity(given.run_dir, given.model, given.output_dir)
    evaluation = evaluation | {"limit": given.limit, **identity}
    folder = Path(given.output_dir or Path(given.run_dir) / "eval" / name)
    return claim_folder(folder, evaluation, is_named=bool(given.output_dir), write=write)
