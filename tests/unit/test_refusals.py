"""Whatever stands in a recipe, a launch file or a data file: it is read, or refused in one sentence, soon.

The corpus holds what has gone wrong in such readers before; hypothesis puts it anywhere, and changes whole files.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.chat_tokenizers import byte_chat_tokenizer

from isotune.cli import main
from isotune.commands.start import read_launch
from isotune.commands.trained import evaluate_classifier
from isotune.config import ClassificationRecipe, Recipe, read_recipe
from isotune.config.layers import read_file
from isotune.data.sft.messages import example_of
from isotune.data.sft.tokenization import ConversationEncoder
from isotune.data.sources.source import read_rows
from isotune.distributed.accelerate_launch import check_config_file
from isotune.distributed.deepspeed_config import complete
from isotune.distributed.launch import check_keys, request_of
from isotune.distributed.launch_file import read_launch_file
from isotune.evaluation.tasks import GenerationTask, read_task
from isotune.io.errors import UserError
from isotune.io.reading import Unreadable, parse_yaml
from isotune.io.variables import NUMBERS, check_numbers

SECONDS = 5.0  # of CPU time, that no refusal may take
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(n)}: &{chr(n)} [{', '.join([f'*{chr(n - 1)}'] * 9)}]\n" for n in range(ord("b"), ord("k"))
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(n)}: &{chr(n)} {{<<: [{', '.join([f'*{chr(n - 1)}'] * 9)}], y{n}: 1}}\n" for n in range(ord("b"), ord("k"))
)
FILES: dict[str, bytes] = {
    "nothing": b"",
    "brackets": b"seed: " + b"[" * 100_000,
    "braces": b"{a: " * 50_000,
    "dashes": b"seed:\n  " + b"- " * 20_000 + b"1",
    "a deep block": b"".join(b" " * n + b"a:\n" for n in range(3000)),
    "NUL": b"seed: 1\0",
    "an alias bomb": BOMB.encode(),
    "a bomb of merges": MERGES.encode(),
    "itself": b"seed: &a [*a]",
    "cut UTF-8": b"seed: 1\nrun_name: \xe4\xbd",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "a tag": b"seed: !!python/object/apply:os.system [id]",
    "a tag of its own": b"seed: !x 1",
    "a date that is none": b"run_name: 2020-99-99",
    "two documents": b"seed: 1\n---\nseed: 2",
    "a list": b"- 1\n- 2",
    "a number": b"7",
    "a key that is a list": b"? [a]\n: 1",
    "a large number": b"seed: " + b"9" * 5000,
    "a long line": b"run_name: " + b"x" * 900_000,
    "a large file": b"# " + b"x" * 2_000_000,
    "tabs": b"seed:\t1\n\tbf16: true",
    "an anchor without end": b"seed: &",
    "a directive": b"%YAML 9.9\n---\nseed: 1",
}
VALUES: tuple[str, ...] = (
    "1e22", "-1e22", "1e400", "9" * 400, "-1", "0", "1.5", ".nan", "-.inf", "0x7fffffffffffffff", "1e-400", "1_000",
    "true", "~", "''", "[]", "{}", "[[[[1]]]]", "{a: {b: {c: 1}}}", "[1, x, null]", "2020-01-01", "2020-99-99", '"\\0"',
    '"\\ud800"', '"a\\nb"', "a" * 300, "x/" * 3000, "/dev/zero", "/dev/null", "../" * 50, "'%s %(x)s {y}'", '"{"',
    '"[1, 2"', "é世界", "!!binary x",
)  # fmt: skip
PHASES = [Phase.explicit, Phase.generate]  # the smallest case would say little more
EASY: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": PHASES}
COUNTS: Counter[str] = Counter()


def tried(call: Callable[[], Any], what: object, seconds: float = SECONDS) -> str | None:
    """The sentence of a refusal, None where there was none; whatever else is raised fails the test."""
    started, sentence = time.process_time(), None
    COUNTS["tried"] += 1
    try:
        call()
        COUNTS["accepted"] += 1
    except UserError as refused:
        COUNTS["refused"] += 1
        sentence = str(refused)
        assert sentence and "\n" not in sentence and len(sentence) < 2000, (what, sentence)
    assert time.process_time() - started < seconds, what
    return sentence


def recipe_of(file: Path, kind: Any = Recipe, *more: str) -> Any:
    flags = ["--config", str(file), "--output_dir", "runs/x", *more]
    return read_recipe(flags, default_config=None, prog="x", description="x", kind=kind)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe_is_refused_within_two_seconds(tmp_path, name):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(FILES[name])
    for kind in (Recipe, ClassificationRecipe):
        sentence = tried(lambda kind=kind: recipe_of(file, kind), name, seconds=2.0)
        assert sentence is not None and "Traceback" not in sentence


def test_the_corpus_is_refused_wherever_yaml_or_json_is_read(tmp_path):
    file = tmp_path / "file.yaml"
    for name, content in FILES.items():
        file.write_bytes(content)
        assert tried(lambda: read_task(GenerationTask, file, {}), name, 2.0) is not None
        started = time.process_time()
        try:
            read_launch_file(file)
        except Unreadable as reason:
            assert "\n" not in reason.of(file)
        assert time.process_time() - started < 2.0, name


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for place, kind in ((pipe, "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        assert f"is {kind}" in str(tried(lambda place=place: read_file(place), place))
        assert f"is {kind}" in str(tried(lambda place=place: read_task(GenerationTask, place, {}), place))
    recipe = {"model_name_or_path": "builtin:opt-tiny", "output_dir": str(tmp_path / "run")}
    for key, value in (("dataset_name", str(pipe)), ("dataset_name", "/dev/zero"), ("model_name_or_path", str(pipe))):
        values = {"dataset_name": "builtin:greetings", **recipe, key: value}
        assert "not a file or a folder" in str(tried(lambda values=values: Recipe.from_values(**values), value))
    mixed = [{"dataset_name": str(pipe)}]
    assert "is a pipe" in str(tried(lambda: Recipe.from_values(**recipe, dataset_mixture=mixed), mixed))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_steps", "1e22", "at most 1,000,000,000"),
        ("max_steps", 10**400, "at most 1,000,000,000"),
        ("learning_rate", "1e30", "of at least 0 and at most 1000"),
        ("global_batch_size", 1e12, "at most 1,000,000,000"),
        ("max_seq_length", "99999999999", "at most 1,000,000,000"),
        ("num_train_epochs", 1e20, "at most 1,000,000,000"),
        ("warmup_steps", 1e15, "at most 1,000,000,000"),
        ("ddp_timeout", 10**10, "at most 1,000,000,000"),
        ("weight_decay", "1e300", "at most 1,000,000,000"),
        ("run_name", "a\0b", "a text holds no NUL"),
        ("run_name", "\ud800", "it is not UTF-8"),
        ("output_dir", "x" * 256, "a name has at most 255 bytes"),
        ("output_dir", "世" * 86, "a name has at most 255 bytes"),
        ("dataset_name", "x/" * 3000, "a path 4,095"),
    ],
)
def test_absurd_values_are_refused_with_what_the_key_takes(key, value, says):
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", key: value}
    assert says in str(tried(lambda: Recipe.from_values(**values), key))
    largest = {"max_steps": 10**9, "learning_rate": 1000, "output_dir": "x" * 255}
    if key in largest:
        Recipe.from_values(**values | {key: largest[key]})


def test_a_variable_that_holds_no_number_is_named():
    for name in NUMBERS:
        for text in ("x", "-1", "1.5", "1e3", "٣", "9" * 30, "0x10"):
            assert name in str(tried(lambda n=name, t=text: check_numbers({n: t}), name))
        check_numbers({name: "1"})
        check_numbers({name: ""})
    assert "WORLD_SIZE" in str(tried(lambda: check_numbers({"WORLD_SIZE": "0"}), "0"))


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--world_size", "1000000000000"],
        ["plan", "--world_sizes", "1,1000000000000"],
        ["plan", "--world_sizes", "x" * 5000],
        ["plan", "--price_per_hour", "nan"],
        ["compare", "a", "b", "--resamples", "1000000000000"],
        ["compare", "a", "b", "--seed", "9" * 5000],
        ["sft", "builtin:greetings", "--num_processes", "1000000000000"],
        ["sft", "x" * 300],
        ["sft", "--config", "x" * 300],
        ["sft", "--config", "/dev/zero"],
        ["eval", "x" * 5000],
        ["runs", "x" * 300],
        ["report", "x" * 300],
        ["report", "a\0b"],
        ["export", "x" * 5000],
        ["ls", "runs", "--output_dir", "x" * 300],
    ],
    ids=lambda words: " ".join(words)[:50],
)
def test_an_absurd_word_of_a_command_line_is_one_sentence(words, capsys):
    started = time.process_time()
    with pytest.raises(SystemExit) as leaving:
        main(words)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert leaving.value.code == 2 and len(errors) == 1, err
    assert "Traceback" not in err and len(err) < 6000
    assert time.process_time() - started < 2 * SECONDS  # the first of them imports the libraries


def test_a_seed_of_an_evaluation_below_0_is_refused_before_the_work():
    words = ["--model", "a/b", "--dataset_name", "c/d", "--seed", "-1"]
    with pytest.raises(UserError, match="--seed is -1: it is 0 or a positive number"):
        evaluate_classifier.read_arguments(words, prog="eval", description="")


def any_of(*keys: str) -> st.SearchStrategy[str]:
    """A few lines of YAML, with values of the corpus or near ones."""
    value = st.one_of(st.sampled_from(VALUES), st.text(max_size=20).map(json.dumps), st.integers().map(str))
    line = st.tuples(st.sampled_from(keys), value).map(": ".join)
    return st.lists(line, min_size=1, max_size=4).map("\n".join)


SFT, CLASSIFIER = sorted(Recipe.keys()), sorted(ClassificationRecipe.keys())
LAUNCH = (
    "distributed_type: DEEPSPEED", "distributed_type: FSDP", "num_processes", "num_machines", "mixed_precision",
    "distributed_type: MULTI_CPU", "use_cpu", "deepspeed_config", "fsdp_config", "machine_rank", "rdzv_backend",
    "same_network", "main_process_port", "odd", "distributed_type",
)  # fmt: skip


def fuzz_recipe(folder: Path, text: str) -> None:
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    needed = [f"--{key}=x" for key in ("model_name_or_path", "dataset_name") if key not in text]
    for kind in (Recipe, ClassificationRecipe):
        tried(lambda kind=kind: recipe_of(file, kind, *needed), text)


def fuzz_launch(folder: Path, text: str) -> None:
    file = folder / "launch.yaml"
    lines = ["debug: false", *text.splitlines()]
    for number, line in enumerate(lines):  # of those that name an engine, the value is the first
        kind = next((each for each in LAUNCH if ": " in each and line.startswith(each)), None)
        lines[number] = kind or line
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))

    def read() -> None:  # the command, then the launcher, then each rank
        read_launch(["--engine", str(file), "--num_processes", "2"])
        check_config_file(str(file))
        request = request_of(["--config_file", str(file), "script.py"])
        if request is not None:
            check_keys(request)

    tried(read, text)


def fuzz_deepspeed(text: str) -> None:
    try:
        section: Any = parse_yaml(text)
        config = json.loads(json.dumps(section, default=str))
    except (Unreadable, ValueError):
        return
    recipe = Recipe.from_values(model_name_or_path="m", dataset_name="d", output_dir="o")
    if isinstance(config, dict):
        tried(lambda: complete(config, recipe, 2, "ds.json"), text)


DEEPSPEED = (
    "zero_optimization", "bf16", "fp16", "amp", "torch_autocast", "data_types", "communication_data_type",
    "gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "managed_gradient_accumulation", "pipeline",
    "optimizer", "odd",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=120, derandomize=True, **EASY)
@given(any_of(*SFT, *CLASSIFIER))
def test_any_value_of_any_key_of_a_recipe_is_taken_or_refused(place, text):
    fuzz_recipe(place, text)


def test_a_value_of_several_lines_is_shown_in_one(place):
    fuzz_recipe(place, 'dataset_prompt_field: "a\\nb"')


def test_a_key_that_needs_a_missing_one_says_so(place):
    for key in ("dataset_split: test", "eval_dataset_split: x", "lora_alpha: 4", "dataset_config: x"):
        fuzz_recipe(place, key)
        assert "missing" in str(tried(lambda: recipe_of(place / "recipe.yaml"), key))


@settings(max_examples=40, derandomize=True, **EASY)
@given(any_of(*LAUNCH))
def test_any_value_of_any_key_of_a_launch_file_is_taken_or_refused(place, text):
    fuzz_launch(place, text)


@settings(max_examples=40, derandomize=True, **EASY)
@given(any_of(*DEEPSPEED))
def test_any_value_of_any_key_of_deepspeeds_is_taken_or_refused(text):
    fuzz_deepspeed(text)


ROWS = {
    "rows.jsonl": b'{"text": "one", "label": 0}\n{"text": "two", "label": 1}\n',
    "rows.json": b'[{"text": "one", "label": 0}, {"text": "two", "label": 1}]',
    "rows.csv": b'text,label\n"one, or none",0\ntwo,1\n',
    "rows.tsv": b"text\tlabel\none\t0\ntwo\t1\n",
}
CHANGE = st.tuples(
    st.sampled_from(list(ROWS)), st.floats(0, 1, exclude_max=True), st.binary(max_size=6), st.integers(0, 9)
)


def fuzz_rows(folder: Path, change: tuple[str, float, bytes, int]) -> None:
    name, at, put, gone = change
    content, file = ROWS[name], folder / name
    position = int(at * len(content))
    file.write_bytes(content[:position] + put + content[position + gone :])
    tried(lambda: list(read_rows(str(file)).rows()), change)


@settings(max_examples=120, derandomize=True, **EASY)
@given(CHANGE)
def test_any_bytes_in_a_data_file_are_rows_or_one_sentence(place, change):
    fuzz_rows(place, change)


def made_of_arrow(folder: Path) -> dict[str, bytes]:
    """The files of a data set in Arrow's formats, and as `datasets` saves it, by their names."""
    when = [datetime(2020, 1, 1), None]
    table = pa.table({"text": ["one", "two" * 40], "label": [0, 1], "of": [{"a": [1.5]}, None], "when": when})
    pq.write_table(table, folder / "rows.parquet")
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]}).save_to_disk(str(folder / "saved"))
    saved = {f"saved/{path.name}": path for path in (folder / "saved").iterdir()}
    files = {name: folder / name for name in ("rows.parquet", "file.arrow", "stream.arrow")} | saved
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.fixture(scope="module")
def arrow(place: Path) -> tuple[Path, dict[str, bytes]]:
    (place / "arrow").mkdir()
    return place / "arrow", made_of_arrow(place / "arrow")


BYTES = st.tuples(st.integers(0, 99), st.floats(0, 1, exclude_max=True), st.binary(max_size=6), st.integers(0, 9))


def fuzz_arrow(arrow: tuple[Path, dict[str, bytes]], change: tuple[int, float, bytes, int]) -> None:
    (folder, files), (number, at, put, gone) = arrow, change
    name = sorted(files)[number % len(files)]
    content, position = files[name], int(at * len(files[name]))
    (folder / name).write_bytes(content[:position] + put + content[position + gone :])
    what = folder / "saved" if name.startswith("saved/") else folder / name
    try:
        tried(lambda: list(read_rows(str(what)).rows()), (name, change))
    finally:
        (folder / name).write_bytes(content)


CARD_LINES = (
    "configs", "configs: [{config_name: a, data_files: rows.jsonl}]", "dataset_info", "license",
    "configs:\n- config_name",
    "dataset_info: {features: [{name: text, dtype: string}]}", "dataset_info:\n  features", "dataset_info:\n- features",
    "dataset_info: {features: [{name: label, dtype: {class_label: {names: [a, b]}}}]}",
)  # fmt: skip


def fuzz_card(folder: Path, text: str) -> None:
    (folder / "card").mkdir(exist_ok=True)
    (folder / "card" / "rows.jsonl").write_bytes(ROWS["rows.jsonl"])
    (folder / "card" / "README.md").write_bytes(f"---\n{text}\n---\n# Rows\n".encode("utf-8", "surrogatepass"))
    tried(lambda: list(read_rows(str(folder / "card")).rows()), text)


# what a template is made of: hypothesis puts it together
PIECES = (
    "{% for m in messages %}", "{% for a in range(99999) %}", "{% endfor %}", "{% if m %}", "{% else %}", "{% endif %}",
    "{{ m.content }}", "{{ m['role'] }}", "{{ messages[0] }}", "{{ messages[9].x.y }}", "{{ 1 / 0 }}",
    "{{ 'x' * 99999 }}", "{% set n = namespace(s='ab') %}", "{% set n.s = n.s ~ n.s %}", "{% set n.s = n.s * 9 %}",
    "{{ n.s | length }}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{", "%}", "{#",
    "{{ messages | tojson(indent=9) }}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "{% generation %}",
    "{{ raise_exception('no') }}", "{% endgeneration %}", "{{ eos_token }}", "{{ m | map('upper') | list }}",
    "{{ '%s' % m }}", "{{ '{}'.format(m) }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
    "{% block b %}", "{% endblock %}", "{{ 9 ** 9 ** 9 }}", "{{ messages.append(1) }}", "{{ strftime_now('%Y') }}",
    "{{ [messages] * 99 }}", "{% break %}", "{% continue %}",
)  # fmt: skip
TEMPLATES = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=9).map("".join)
QUESTION, TOKENIZER = [{"role": "user", "content": "q"}], byte_chat_tokenizer()


def fuzz_template(folder: Path, text: str) -> None:
    (folder / "own.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))

    def ask() -> None:
        encoder = ConversationEncoder(TOKENIZER, str(folder / "own.jinja"))
        asked = [*QUESTION, {"role": "assistant", "content": "a"}] * 4 + QUESTION
        try:
            encoder.prompt(asked)
            encoder.encode(encoder.conversations(example_of(tuple(asked[:-1]))))
        except ValueError as refused:  # a row that the template refuses, which a reader of rows names
            raise UserError(str(refused)) from refused

    tried(ask, text, 40.0)


@settings(max_examples=150, derandomize=True, **EASY)
@given(BYTES)
def test_any_bytes_in_a_file_of_arrows_or_of_a_saved_data_set_are_rows_or_one_sentence(arrow, change):
    fuzz_arrow(arrow, change)


@settings(max_examples=60, derandomize=True, **EASY)
@given(any_of(*CARD_LINES))
def test_any_lines_of_a_card_are_followed_or_refused(place, text):
    fuzz_card(place, text)


@settings(max_examples=150, derandomize=True, **EASY)
@given(TEMPLATES)
def test_any_template_is_rendered_or_refused(place, text):
    fuzz_template(place, text)


@pytest.mark.slow
def test_minutes_of_any_values_give_answers_and_sentences_alone(place, arrow):
    """Every kind of file above, more often; the counts are printed."""
    counted: dict[str, dict[str, int]] = {}

    def count(what: str, given_by: st.SearchStrategy[Any], fuzz: Callable[[Any], None], examples: int) -> None:
        COUNTS.clear()
        settings(**EASY | {"max_examples": examples})(given(given_by)(fuzz))()
        counted[what] = dict(COUNTS)

    count("recipes", any_of(*SFT, *CLASSIFIER), lambda text: fuzz_recipe(place, text), 3000)
    count("launch files", any_of(*LAUNCH), lambda text: fuzz_launch(place, text), 1000)
    count("DeepSpeed's files", any_of(*DEEPSPEED), fuzz_deepspeed, 1000)
    count("JSON, CSV and TSV", CHANGE, lambda change: fuzz_rows(place, change), 3000)
    count("Parquet, Arrow and saved data sets", BYTES, lambda change: fuzz_arrow(arrow, change), 3000)
    count("cards", any_of(*CARD_LINES), lambda text: fuzz_card(place, text), 1000)
    count("chat templates", TEMPLATES, lambda text: fuzz_template(place, text), 3000)
    COUNTS.clear()
    for key in SFT:  # each value at each key once
        for value in VALUES:
            fuzz_recipe(place, f"{key}: {value}")
    counted["each value at each key"] = dict(COUNTS)
    for what, counts in counted.items():
        print(what, counts)
    assert all(counts["refused"] > 100 and counts["accepted"] > 0 for counts in counted.values()), counted
    assert sum(counts["accepted"] for counts in counted.values()) > 2_000


def test_the_corpus_is_what_it_says():
    """The aliases of the bomb stand for 9 ** 10 values, which nobody can hold."""
    assert yaml.safe_load(FILES["a list"]) == [1, 2] and BOMB.count("*") == 81
