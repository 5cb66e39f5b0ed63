"""The `isotune` command: start runs and evaluations, plan, check a machine, and export, compare and report runs."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from isotune import __version__
from isotune.io import shipped
from isotune.io.errors import EXIT_USER_ERROR, OneSentenceParser, UserError, run_script
from isotune.preflight import command as plan_command
from isotune.run.malloc_tuning import restart_with_malloc_tuning

# commands that read their own words, which may be any key of a recipe, with what `isotune --help` says of them
OWN_WORDS = {
    "sft": "train a language model: isotune sft RECIPE | RUN | DATA [FLAGS]",
    "classify": "train a classifier: isotune classify RECIPE | RUN | DATA [FLAGS]",
    "arena": "train on the Chatbot Arena: isotune arena RECIPE [FLAGS]",
    "eval": "evaluate: isotune eval RUN | MODEL [FLAGS]",
    "chat": "talk with a model: isotune chat RUN | MODEL [FLAGS]",
    "predict": "predict texts, or rows: isotune predict RUN | MODEL TEXT ... | --input DATA --output FILE",
    "serve": "a page and an API of a run on this machine: isotune serve RUN [FLAGS]",
    "sweep": "search keys of a recipe: isotune sweep RECIPE --KEY LOW..HIGH | A,B,C ... [FLAGS]",
    "slurm": "submit to a cluster: isotune slurm sft|classify|arena|eval WHAT [FLAGS]",
}
TRAINING = ("sft", "classify", "arena")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry of the console script: exits with the status of the contract."""
    if arguments is None and sys.argv[1:2] and sys.argv[1] in TRAINING:
        restart_with_malloc_tuning()
    run_script(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int | None:
    if arguments and arguments[0] in OWN_WORDS:
        return _run_own_words(arguments[0], arguments[1:])
    parser = command_parser()
    if not arguments:
        parser.print_help()
        raise UserError("a command is missing")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.run is plan_command.run:  # the flags that are not its own are keys of the recipe
        return chosen.run(chosen, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return chosen.run(chosen)


def _run_own_words(command: str, words: Sequence[str]) -> int | None:
    if command in TRAINING:
        from isotune.commands import train

        return train.run(command, words)
    if command == "slurm":
        from isotune.commands import slurm

        return slurm.run(words)
    if command == "sweep":
        from isotune.commands.sweep import command as sweep

        return sweep.run(words)
    if command == "predict":
        from isotune.commands.trained import predict

        return predict.run_predict(words)
    if command == "serve":
        from isotune.commands.trained import serve

        return serve.run(words)
    from isotune.commands.trained import evaluate

    return evaluate.run_eval(words) if command == "eval" else evaluate.run_chat(words)


def command_parser() -> argparse.ArgumentParser:
    """The command line. What a command calls imports its libraries when it runs."""
    parser = OneSentenceParser(
        prog="isotune",
        description="Fine-tuning whose result does not depend on how it was run.",
        epilog="In a checkout train/ and eval/ hold the same as scripts, for accelerate launch and sbatch.",
    )
    parser.add_argument("--version", action="version", version=f"isotune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int | None], **texts: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        added.set_defaults(run=run)
        return added

    for name, meaning in OWN_WORDS.items():
        commands.add_parser(name, help=meaning)

    listing = command("ls", _list, help="list shipped recipes, tasks and engines, models, and the runs here")
    listing.add_argument("kinds", metavar="KIND", nargs="*", help="recipes, tasks, engines, models or runs (all)")
    listing.add_argument("--output_dir", default="runs", metavar="DIR", help="where the runs are (%(default)s)")
    copying = command("cp", _copy, help="copy a shipped recipe, task or engine to a file of your own")
    copying.add_argument("name", metavar="NAME", help="its name, as `isotune ls` lists it")
    copying.add_argument("file", metavar="FILE", nargs="?", help="the new file (NAME.yaml)")

    runs = command(
        "runs",
        _runs,
        help="list runs with their state, progress, best metric and age",
        description=(
            "List the runs below folders: their state (a run whose processes are gone is `killed`, whatever its files\n"
            "say), the last step, the best value of the metric that chooses the best model, and the time since the\n"
            "last change."
        ),
    )
    runs.add_argument("folders", metavar="FOLDER", nargs="*", default=["runs"], help="where the runs are (runs)")
    runs.add_argument("--json", action="store_true", help="print JSON instead of a table")

    export = command(
        "export",
        _export,
        help="write a run's model for use elsewhere, an adapter merged into its base",
        description=(
            "Write a run's model for use elsewhere. What was written is read back and compared, and run on rows of\n"
            "the run's evaluation data: the largest difference of a logit, how many classes or greedy tokens are equal."
        ),
        epilog=(
            "examples:\n"
            "  isotune export runs/opt350m_lora                        the adapter, for peft\n"
            "  isotune export runs/opt350m_lora --merge                a Hugging Face folder\n"
            "  isotune export runs/opt350m_lora --merge --format pt    model.pt, for load_state_dict\n"
            "  isotune export runs/yelp_bert --format onnx             model.onnx, for ONNX Runtime\n"
            "  isotune export runs/chats --format gguf                 model.gguf, for llama.cpp and Ollama\n"
            "  isotune export runs/opt350m_lora/checkpoints/step-00000500    a checkpoint, whichever engine wrote it"
        ),
    )
    export.add_argument("run_dir", metavar="RUN", help="the folder of a finished run, or of a checkpoint")
    merge = "merge the adapter into its base model, and print the difference"
    export.add_argument("--merge", action="store_true", help=merge)
    export.add_argument("--format", default="safetensors", help="safetensors (default), pt, onnx or gguf")
    export.add_argument("--output", metavar="DIR", help="a folder that is absent or empty (default: in RUN/export)")
    dtype = "data type of merged weights: float32, float16 or bfloat16 (default: as trained)"
    export.add_argument("--dtype", help=dtype)

    compare = command(
        "compare",
        _compare,
        help="test whether runs differ on the same evaluated rows",
        description=(
            "Compare evaluated runs on the same rows, each with the first: McNemar's exact test for accuracy, a\n"
            "permutation test for other metrics, 95% intervals by paired bootstrap, and Holm's correction over\n"
            "all of them. Runs that were evaluated on other rows are refused."
        ),
        epilog=(
            "examples:\n"
            "  isotune compare runs/demo-base runs/demo\n"
            "  isotune compare runs/bert runs/distilbert runs/albert --all_pairs --name test\n"
            "  isotune compare runs/yelp_bert/eval/a runs/yelp_bert/eval/b --metrics accuracy log_loss --json"
        ),
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or of results: RUN/eval/NAME")
    compare.add_argument("--name", help="name of the evaluation, where the runs have several in common")
    metrics = "metrics to test (a few that matter)"
    compare.add_argument("--metrics", nargs="+", default=[], metavar="METRIC", help=metrics)
    pairs = "compare every pair of runs, not only each with the first"
    compare.add_argument("--all_pairs", action="store_true", help=pairs)
    for name, default, meaning in (
        ("--examples", 3, "example rows to show for each direction (%(default)s)"),
        ("--resamples", 10_000, "number of bootstrap resamples (%(default)s)"),
        ("--seed", 0, "seed of the resamples (%(default)s)"),
    ):
        compare.add_argument(name, type=int, default=default, metavar="N", help=meaning)
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")

    report = command(
        "report",
        _report,
        help="write one self-contained HTML file of a run, or of several side by side",
        description=(
            "Write one HTML file: what ran, curves, metrics with intervals, pictures, examples; of several runs\n"
            "also what differs between them and whether one is significantly better. It loads no model."
        ),
        epilog="examples:\n  isotune report runs/demo\n  isotune report runs/demo-base runs/demo --output two.html",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, finished or not")
    report.add_argument("--output", metavar="FILE", help="the file to write (in the first RUN)")

    ensemble = command(
        "ensemble",
        _ensemble,
        help="blend the predictions of classifiers and baselines on the same rows",
        description=(
            "Blend what several runs predicted of the same evaluated rows, by equal weights or by weights that\n"
            "minimize the log loss; each row is then blended with weights that were fitted without it. The blend is\n"
            "an evaluation like any other: isotune compare and isotune report take its folder."
        ),
        epilog="examples:\n  isotune ensemble runs/arena_bert runs/arena_baselines --weights fitted --name arena_test",
    )
    ensemble.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or of results: RUN/eval/NAME")
    ensemble.add_argument("--weights", default="equal", help="equal or fitted (%(default)s)")
    ensemble.add_argument("--name", help="name of the evaluation, where the runs have several in common")
    other = "another evaluation of the runs, whose labels the weights are fitted to in place of these rows'"
    ensemble.add_argument("--fit_on", metavar="NAME", help=other)
    place = "the blend goes to DIR/eval/NAME, and what predicts with it to DIR/ensemble.json (%(default)s)"
    ensemble.add_argument("--output_dir", default="runs/ensemble", metavar="DIR", help=place)
    for name, default, meaning in (
        ("--folds", 5, "of the cross-validation of fitted weights (%(default)s)"),
        ("--seed", 0, "of the folds and the intervals (%(default)s)"),
        ("--resamples", 2000, "of the bootstrap intervals (%(default)s)"),
    ):
        ensemble.add_argument(name, type=int, default=default, metavar="N", help=meaning)

    validate = command(
        "validate-submission",
        _validate_submission,
        help="check a submission.csv and list all its mistakes",
        description="Check a submission and list all its mistakes: columns, order, ids,\nprobabilities and their sums.",
    )
    validate.add_argument("file", metavar="FILE", help="the submission")
    validate.add_argument("--sample", metavar="FILE", required=True, help="the competition's sample_submission.csv")

    plan = command(
        "plan",
        plan_command.run,
        help="show what a run will do and need of memory, time and money, before it starts",
        description=(
            "List all mistakes in a recipe and its launch, and show what the run would do and need.\n"
            "Nothing is trained and no weights are loaded: a config.json is enough, and no GPU is needed."
        ),
        epilog=plan_command.EXAMPLES,
        allow_abbrev=False,
    )
    plan_command.add_arguments(plan)

    doctor = command(
        "doctor",
        _doctor,
        help="check this machine and launch for what could spoil a run",
        description="Check versions, devices, kernels, compilers, disks, caches, the Hub, SLURM and the network.",
        epilog=(
            "examples:\n"
            "  isotune doctor\n"
            "  isotune doctor --output_dir /scratch/me/runs\n"
            f"  accelerate launch --config_file {shipped.path('accelerate_configs/ddp.yaml')} --num_processes 8 \\\n"
            "      -m isotune.cli doctor"
        ),
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table, as a bug report asks for")
    doctor.add_argument("--output_dir", default="runs", metavar="DIR", help="where runs would go (%(default)s)")
    return parser


def _list(chosen: argparse.Namespace) -> None:
    from isotune.commands.listing import list_all

    list_all(chosen.kinds, Path(chosen.output_dir))


def _copy(chosen: argparse.Namespace) -> None:
    from isotune.commands.listing import copy_shipped

    print(f"copied      {copy_shipped(chosen.name, chosen.file)}")


def _runs(chosen: argparse.Namespace) -> None:
    from isotune.commands.runs import list_runs

    list_runs(chosen.folders, as_json=chosen.json)


def _export(chosen: argparse.Namespace) -> None:
    from isotune.checkpoint.export import export_run

    options = {name: getattr(chosen, name) for name in ("merge", "format", "output", "dtype")}
    done = export_run(chosen.run_dir, **options)
    if done.parity is not None:
        print(done.parity)
    elif chosen.merge:
        print(f"{chosen.run_dir} trained the whole model: there is nothing to merge")
    print(done.measured)
    print("\n".join(done.servers), end="\n" if done.servers else "")
    print(f"wrote the {done.kind} to {done.place}")


def _compare(chosen: argparse.Namespace) -> None:
    from isotune.evaluation.comparison import compare_runs
    from isotune.report.formatting import comparison_text

    options = ("name", "metrics", "all_pairs", "resamples", "seed", "examples")
    comparison = compare_runs(chosen.runs, **{name: getattr(chosen, name) for name in options})
    print(json.dumps(comparison.as_dict(), indent=2) if chosen.json else comparison_text(comparison))


def _ensemble(chosen: argparse.Namespace) -> None:
    from isotune.evaluation.ensemble import build_ensemble

    options = ("weights", "name", "fit_on", "folds", "seed", "resamples")
    print(build_ensemble(chosen.runs, chosen.output_dir, **{name: getattr(chosen, name) for name in options}).table())


def _report(chosen: argparse.Namespace) -> None:
    from isotune.report.html_report import write_report

    print(f"report      {write_report(chosen.runs, chosen.output)}")


def _validate_submission(chosen: argparse.Namespace) -> int:
    from isotune.projects.arena.submission import check_submission

    problems, rows = check_submission(Path(chosen.file), Path(chosen.sample))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{chosen.file}: {rows:,} rows, nothing is wrong")
    return EXIT_USER_ERROR if problems else 0


def _doctor(chosen: argparse.Namespace) -> int:
    from isotune.doctor import run_doctor

    return run_doctor(Path(chosen.output_dir), as_json=chosen.json)


if __name__ == "__main__":
    main()
