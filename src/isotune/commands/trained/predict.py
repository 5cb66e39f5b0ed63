"""`isotune predict`: what a run, or any model, says of given texts or of the rows of a file."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isotune.commands import start
from isotune.commands.before_torch import before_torch
from isotune.commands.trained.evaluate import is_classifier, read_source
from isotune.commands.trained.flags import add_data_flags, add_launch_flags, check_counts, timeouts_of
from isotune.config.layers import read_file
from isotune.config.recipes import project_of
from isotune.io.errors import OneSentenceParser, UserError
from isotune.io.run_files import ENSEMBLE, LOGS_DIR, RECIPE

USAGE = """isotune predict RUN | MODEL TEXT ...
isotune predict RUN | MODEL --input DATA --output FILE [--num_processes N] [FLAGS]

Texts are answered on the terminal. Of a file every row is predicted, in its order, into a .csv or .jsonl file; the same
command goes on where it was stopped. Classes come with their names and probabilities; a language model answers."""
OF_CLASSES = ("text_pair", "dataset_text_pair_field", "batch_tokens", "bf16")
OF_ANSWERS = ("dataset_prompt_field", "max_new_tokens", "temperature", "top_p", "seed")


def run_predict(argv: Sequence[str]) -> int | None:
    """`isotune predict ARGV`, here or on the processes of a launch."""
    source, words = read_source("predict", argv, USAGE)
    given = read_arguments(words)
    given.timeouts = timeouts_of(given, source[1] if source[0] == "--run_dir" else None)
    if given.input is None:
        if given.num_processes is not None or given.engine is not None:
            raise UserError("--num_processes and --engine are for the rows of a file: name it by --input")
        return _predict(source, given)
    launch, rest = start.read_launch(words)
    if launch.file is not None:
        return start.run_launched(["predict", source[1], *rest], launch)
    return _predict(source, given)


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The texts and flags behind the run; UserError says what is wrong with them."""
    parser = OneSentenceParser(
        prog="isotune predict", usage=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="to classify, or to answer")
    parser.add_argument("--text_pair", metavar="TEXT", nargs="+", help="the second texts, where the model reads pairs")
    data = parser.add_argument_group("rows")
    data.add_argument("--input", metavar="DATA", help="a file, a folder, a Hub id or builtin:NAME")
    data.add_argument("--output", metavar="FILE", help="where the predictions go: .csv or .jsonl")
    data.add_argument("--dataset_split", default="test", metavar="SPLIT", help="of a folder or a Hub id (%(default)s)")
    add_data_flags(data)
    data.add_argument("--dataset_text_field", metavar="COLUMN", help="holds the texts (as the run's recipe says)")
    data.add_argument("--dataset_text_pair_field", metavar="COLUMN", help="holds the second texts of pairs")
    data.add_argument(
        "--dataset_prompt_field",
        metavar="COLUMN",
        help="holds the questions (the recipe's, or by name)",
    )
    data.add_argument("--dataset_id_field", metavar="COLUMN", help="is kept beside each prediction, or none (id)")
    data.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    how = parser.add_argument_group("computation (changes predictions by rounding only)")
    how.add_argument("--num_processes", "--num-processes", type=int, metavar="N", help="one for each GPU, or one")
    how.add_argument("--engine", metavar="NAME", help="of several processes (ddp)")
    how.add_argument("--batch_tokens", type=int, metavar="N", help="of one forward (4096 on a CPU, else 65536)")
    how.add_argument("--batch_size", type=int, metavar="N", help="texts of one forward at most, or prompts (16)")
    how.add_argument("--bf16", action="store_true", default=None, help="bf16 instead of fp32, of a classifier")
    how.add_argument("--part_rows", type=int, metavar="N", help="rows that are kept together if it is stopped")
    add_launch_flags(parser)
    answers = parser.add_argument_group("answers")
    answers.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer (256)")
    answers.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0)")
    answers.add_argument("--top_p", type=float, metavar="P", help="nucleus sampling (1)")
    answers.add_argument("--seed", type=int, metavar="N", help="of sampling (0)")
    given = parser.parse_args(words)
    if bool(given.texts) == bool(given.input):
        raise UserError("isotune predict: give texts, or rows by --input" + (", not both" if given.texts else ""))
    if given.input and not given.output:
        raise UserError("isotune predict: --output says where the predictions of --input go: a .csv or .jsonl file")
    for name in ("limit", "part_rows", "dataset_config", "dataset_revision", "dataset_columns"):
        if given.texts and getattr(given, name) is not None:
            raise UserError(f"--{name} is for the rows of --input, and these are texts")
    if given.text_pair and len(given.text_pair) != len(given.texts):
        raise UserError(f"--text_pair has {len(given.text_pair)} texts beside {len(given.texts)}: one for each")
    check_counts(given, ("limit", "batch_tokens", "batch_size", "part_rows"))
    return given


def _predict(source: Sequence[str], given: argparse.Namespace) -> None:
    """The model of its kind; texts, or rows."""
    flag, name = source
    keys = read_file(Path(name, RECIPE)).given if flag == "--run_dir" else {}
    is_ensemble = Path(name, ENSEMBLE).is_file()
    is_project, classifies = project_of(keys) is not None, is_ensemble or is_classifier(source)
    for own in OF_ANSWERS if classifies else OF_CLASSES:
        if getattr(given, own) is not None:
            kind = "answers, and" if classifies else "classifiers, and"
            raise UserError(f"--{own} is of {kind} {name} {'classifies' if classifies else 'answers'}")
    before_torch(quiet=given.input is None)
    # torch takes seconds to import, so mistakes on the command line are answered before
    from isotune.evaluation.distributed_eval import read_shards, start_ranks
    from isotune.evaluation.prediction.files import check_output

    if given.output:
        check_output(Path(given.output))
    shards = None if classifies else read_shards()
    ranks = start_ranks(**given.timeouts)
    with ranks.supervised(Path(f"{given.output}.{LOGS_DIR}").expanduser() / "rank" if given.output else None):
        if is_project:
            _predict_battles(Path(name), given, ranks)
        elif is_ensemble:
            _predict_together(Path(name), given, ranks)
        elif classifies:
            _predict_classes(flag, name, given, ranks)
        else:
            _answer(flag, name, given, ranks, shards)


def _predict_classes(flag: str, name: str, given: argparse.Namespace, ranks: Any) -> None:
    import torch

    from isotune.evaluation.classification.sentences import show_sentences
    from isotune.evaluation.models import load_model_classifier, load_run_classifier
    from isotune.evaluation.prediction.predictors import TextPredictor

    load = load_run_classifier if flag == "--run_dir" else load_model_classifier
    classifier = load(name, ranks.device, torch.bfloat16 if given.bf16 else torch.float32)
    classifier = _with_columns(classifier, given)
    asked = list(zip(given.texts, given.text_pair, strict=True)) if given.text_pair else given.texts
    if not given.output:
        show_sentences(classifier, asked)
        return
    predictor = TextPredictor(classifier, batch_tokens=given.batch_tokens, batch_size=given.batch_size)
    if given.texts and len(predictor.columns) != (2 if given.text_pair else 1):
        raise UserError(f"{name} reads two texts: give the second ones by --text_pair")
    texts = ([one] if isinstance(one, str) else one for one in asked)
    rows = [dict(zip(predictor.columns.values(), each, strict=True)) for each in texts]
    _write(rows, predictor, given, ranks, name, _places(classifier.run, name))


def _with_columns(classifier: Any, given: argparse.Namespace) -> Any:
    """The classifier with the columns that the flags name; UserError for second texts that its run does not read."""
    columns = {key: getattr(given, key) for key in ("dataset_text_field", "dataset_text_pair_field")}
    own_pair = classifier.settings.dataset_text_pair_field
    if classifier.run is not None and own_pair is None and (given.text_pair or columns["dataset_text_pair_field"]):
        raise UserError(f"{classifier.name} was trained on one text a row: leave out the second ones")
    if given.text_pair and not own_pair:
        columns["dataset_text_pair_field"] = columns["dataset_text_pair_field"] or "text_pair"
    named = {key: column for key, column in columns.items() if column is not None}
    return replace(classifier, settings=replace(classifier.settings, **named))


def _predict_together(folder: Path, given: argparse.Namespace, ranks: Any) -> None:
    """The blend of an ensemble's members, each read as its run reads texts."""
    import torch

    from isotune.data.classification.pairs import joined
    from isotune.data.sources.source import Source
    from isotune.evaluation.classification.sentences import print_predictions
    from isotune.evaluation.models import load_run_classifier
    from isotune.evaluation.prediction.ensembles import open_ensemble, read_ensemble

    saved, dtype = read_ensemble(folder), torch.bfloat16 if given.bf16 else torch.float32
    sizes = {"batch_tokens": given.batch_tokens, "batch_size": given.batch_size}
    predictor = open_ensemble(
        saved, lambda run: _with_columns(load_run_classifier(run, ranks.device, dtype), given), **sizes
    )
    places = [place for member in predictor.members for place in _places(member.classifier.run, str(folder))]
    for member in predictor.members if given.texts else ():
        if len(member.columns) != (2 if given.text_pair else 1):
            raise UserError(f"{member.classifier.name} reads two texts: give the second ones by --text_pair")
    # a row of given texts has them under the columns of every member
    rows = [
        {
            column: text
            for member in predictor.members
            for column, text in zip(member.columns.values(), [one, *second], strict=True)
        }
        for one, *second in zip(given.texts, *([given.text_pair] if given.text_pair else []), strict=True)
    ]
    if given.output:
        _write(rows, predictor, given, ranks, str(folder), places)
        return
    source = Source("the command line", "", lambda: iter(rows))
    taken: list[Any] = [(number, predictor.take(row, source, number)) for number, row in enumerate(rows)]
    outputs = predictor.outputs(predictor.prepare(taken), ranks)
    names = saved.label_names or [str(k) for k in range(outputs.shape[-1])]
    texts = joined(given.texts, given.text_pair) if given.text_pair else given.texts
    print_predictions(saved.task_type, texts, outputs, names, saved.thresholds, [None] * len(texts))


def _answer(flag: str, name: str, given: argparse.Namespace, ranks: Any, shards: Any) -> None:
    from isotune.data.sft.forms import TEXT_FIELD, NamedColumns
    from isotune.evaluation.generation.chat import answers
    from isotune.evaluation.generation.completion import BATCH_SIZE, Decoding
    from isotune.evaluation.models import generation_model_named, generation_model_of_run
    from isotune.evaluation.prediction.predictors import AnswerPredictor
    from isotune.models.finished_run import read_run

    chosen = {key: getattr(given, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}
    decoding = Decoding(**{key: value for key, value in chosen.items() if value is not None})
    load = generation_model_of_run if flag == "--run_dir" else generation_model_named
    lm, batch_size = load(name, ranks.device, shards), given.batch_size or BATCH_SIZE
    if not given.output:
        texts = answers(lm, given.texts, decoding, batch_size=batch_size)
        for question, text in zip(given.texts, texts, strict=True):
            print(text if len(texts) == 1 else f"> {question}\n{text}\n", flush=True)
        return
    run = read_run(name) if flag == "--run_dir" else None
    rows = [{given.dataset_prompt_field or "prompt": text} for text in given.texts]
    columns = [NamedColumns(given.dataset_text_field or TEXT_FIELD, given.dataset_prompt_field)]
    if run is not None and columns == [NamedColumns()]:  # no flag names one, so those of training where rows have them
        text, prompt = (run.settings.get(key) for key in ("dataset_text_field", "dataset_prompt_field"))
        columns.insert(0, NamedColumns(text or TEXT_FIELD, prompt))
    predictor = AnswerPredictor(lm, columns, decoding, batch_size)
    _write(rows, predictor, given, ranks, name, _places(run, name))


def _predict_battles(run: Path, given: argparse.Namespace, ranks: Any) -> None:
    from isotune.projects.arena.predict import battle_predictor

    for own in ("bf16", "batch_tokens", "batch_size"):
        if getattr(given, own) is not None:
            raise UserError(f"--{own} is of other classifiers: leave it out for {run}")
    if given.texts or given.dataset_text_field or given.dataset_text_pair_field:
        raise UserError(
            f"{run} reads battles, a prompt with two answers: --input names a file with the columns prompt, response_a "
            "and response_b"
        )
    predictor = battle_predictor(run, ranks.device)
    _write([], predictor, given, ranks, str(run), [run / "model"])


def _places(run: Any, name: str) -> list[str | Path]:
    """Where what decides a model's weights is: its folder, and the base of an adapter."""
    if run is None:
        return [name]
    return [place for place in (run.model, run.base, run.base_commit) if place is not None]


def _write(
    rows: list[dict[str, Any]], predictor: Any, given: argparse.Namespace, ranks: Any, model: str, places: Sequence[Any]
) -> None:
    """Predict the rows of --input, or the given ones, into --output, and say what became of them."""
    from isotune.data.documents import digest
    from isotune.data.sources.source import Source, read_rows
    from isotune.distributed.ranks import call_on_main
    from isotune.evaluation.prediction.predict import digest_of_models, predict_source, summary_lines

    if given.input:
        source = read_rows(
            given.input,
            given.dataset_split,
            name="--input",
            columns=given.dataset_columns,
            config=given.dataset_config,
            revision=given.dataset_revision,
        )
    else:
        source = Source("the command line", digest(*rows), lambda: iter(rows))
    output = Path(given.output).expanduser()
    for made in (output, output.with_name(f"{output.name}.json")):  # what the predictions were made of
        if given.input and Path(given.input).exists() and made.exists() and made.samefile(given.input):
            raise UserError(f"--output {output} would take the place of --input {given.input}")
    output.parent.mkdir(parents=True, exist_ok=True)
    written = predict_source(
        source,
        predictor,
        output,
        ranks,
        model=model,
        model_sha256=call_on_main(ranks, lambda: digest_of_models(places)),
        id_field=given.dataset_id_field,
        limit=given.limit,
        part_rows=given.part_rows,
    )
    if written is not None:
        print("\n".join([*(f"note        {note}" for note in source.notes), *summary_lines(written, output)]))
