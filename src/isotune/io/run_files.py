"""The small files that a run leaves, each with the schema of what its readers rely on: there is one way to read them.

Keys that no reader relies on may hold anything. A file that does not fit is `Unreadable`, with the first key that does
not, and so is one that a symbolic link leads out of the run; a missing one is a FileNotFoundError.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from isotune.io.errors import UserError
from isotune.io.reading import MAX_YAML_BYTES, Unreadable, checked, parse_yaml_object, read_text
from isotune.io.reading import read_json as read_json_as

RECIPE, ENVIRONMENT, STATUS, UPLOAD = "recipe.yaml", "environment.json", "status.json", "upload.json"
SCRIPT = "script"  # the key of a recipe.yaml that a script of one's own has left: a record, and no recipe to run
ENSEMBLE = "ensemble.json"  # of a folder of `isotune ensemble`: the members, and how they are blended
LOGS_DIR = "logs"  # of the processes of a launch
MAX_LINES_BYTES = 2**31  # of metrics.jsonl and predictions.jsonl
LARGEST = 1e300  # a number beyond it overflows in the first product

Whole = Annotated[int, Field(ge=0, le=2**63 - 1)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Section = dict[str, Any]
T = TypeVar("T")


class Status(TypedDict, total=False):
    """RUN/status.json, and a job status file."""

    status: str
    step: Whole
    steps: Whole | None
    exit_status: int | None
    message: str | None
    time: str
    pid: Whole
    finishing: list[str]
    made: dict[str, Whole]
    run: str
    reason: str


class InEffect(TypedDict, total=False):
    """Section `in_effect` of environment.json."""

    engine: str
    zero_stage: Whole | None
    world_size: Whole
    trained_parameters: Whole
    all_parameters: Whole
    exact_gradients: bool


class HubEntry(TypedDict):
    """A repository of the Hub that the run has read."""

    repository: str
    kind: str
    revision: str
    commit: str


class Identity(TypedDict):
    """What makes another run the same as this one."""

    values: Section
    contents: dict[str, str]


class Environment(TypedDict, total=False):
    """RUN/environment.json."""

    recipe_fingerprint: str
    identity: Identity
    versions: dict[str, str]
    git_commit: str | None
    command: list[str]
    device: str
    device_name: str | None
    threads_per_process: Whole
    world_size: Annotated[int, Field(ge=1, le=2**31)]
    slurm: Section | None
    in_effect: InEffect
    isolation: Section
    data_fingerprints: dict[str, str]
    data: dict[str, Section]
    hub: list[HubEntry]


class Upload(TypedDict, total=False):
    """RUN/upload.json."""

    repository: str
    url: str
    commit: str


class Mixed(TypedDict):
    """A data set of a mixture."""

    dataset_name: str


class RecordedRecipe(TypedDict, total=False):
    """The keys of RUN/recipe.yaml that are read without the recipe's own classes."""

    script: str
    task: str
    model_name_or_path: str
    model_revision: str | None
    model_init: str
    tokenizer_name_or_path: str | None
    tune: str
    dataset_name: str
    dataset_split: str
    dataset_mixture: list[Mixed]
    eval_dataset_mixture: list[Mixed]
    eval_dataset_name: str | None
    eval_dataset_split: str
    chat_format: str
    overlong: str
    label_names: list[str] | None
    num_labels: Whole
    task_type: str
    bf16: bool
    fp16: bool
    bnb_4bit_quant_type: str
    bnb_4bit_use_double_quant: bool
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    max_steps: int
    microbatch_tokens: Whole | str


class AttemptRecord(TypedDict):
    """RUN/.lives/NUMBER/life.json."""

    host: str
    began: NotRequired[Number]
    ended: NotRequired[Number]
    processes: NotRequired[Whole | None]
    machine: NotRequired[str]
    pid: NotRequired[Whole]
    started: NotRequired[str | None]
    job: NotRequired[str | None]
    restart: NotRequired[Whole | None]


class Prediction(TypedDict):
    """A line of predictions.jsonl."""

    id: int | str | Number
    group: NotRequired[int | str | Number | None]
    label: NotRequired[int | Number | list[int] | None]
    prediction: NotRequired[int | Number | list[int] | None]
    text: NotRequired[str]
    prompt: NotRequired[str]
    reference: NotRequired[str]
    text_sha256: NotRequired[str]
    exact_match: NotRequired[bool | Number | None]
    match: NotRequired[bool | Number | None]
    chrf: NotRequired[Number | None]
    ended: NotRequired[bool | Number]
    nll: NotRequired[Number | None]
    perplexity: NotRequired[Number | None]
    bits_per_byte: NotRequired[Number | None]


class SavedThresholds(TypedDict):
    """RUN/model/label_thresholds.json."""

    label_thresholds: dict[str, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]]


class Example(TypedDict):
    """A line of examples.jsonl."""

    id: int | str | Number
    actual: str
    predicted: str
    text: str
    probability: NotRequired[Number]


STATUS_SCHEMA, ENVIRONMENT_SCHEMA = TypeAdapter(Status), TypeAdapter(Environment)
UPLOAD_SCHEMA, ATTEMPT_SCHEMA, RECIPE_SCHEMA = (
    TypeAdapter(Upload),
    TypeAdapter(AttemptRecord),
    TypeAdapter(RecordedRecipe),
)
THRESHOLDS_SCHEMA = TypeAdapter(SavedThresholds)
PREDICTION_SCHEMA, EXAMPLE_SCHEMA = TypeAdapter(Prediction), TypeAdapter(Example)


def is_finite_number(value: object) -> bool:
    """Whether a value is a number that later products may hold."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]  (by its type)


def read_status(run: Path) -> Section:
    """RUN/status.json."""
    return dict(read_json_as(run / STATUS, STATUS_SCHEMA, root=run))


def read_environment(run: Path) -> Section:
    """RUN/environment.json."""
    return dict(read_json_as(run / ENVIRONMENT, ENVIRONMENT_SCHEMA, root=run))


def read_upload(run: Path) -> Section:
    """RUN/upload.json."""
    return dict(read_json_as(run / UPLOAD, UPLOAD_SCHEMA, root=run))


def read_label_thresholds(file: Path) -> Section:
    """The threshold of each label, by its name."""
    return dict(read_json_as(file, THRESHOLDS_SCHEMA)["label_thresholds"])


def read_attempt(file: Path) -> Section:
    """The record of an attempt."""
    return dict(read_json_as(file, ATTEMPT_SCHEMA, root=file.parent))


def read_recipe_values(run: Path) -> Section:
    """RUN/recipe.yaml, with YAML's own types."""
    return recipe_values(read_text(run / RECIPE, MAX_YAML_BYTES, root=run))


def recipe_values(text: str) -> Section:
    """The same of its text."""
    return dict(checked(parse_yaml_object(text), RECIPE_SCHEMA))


def run_of_checkpoint(folder: Path) -> Path:
    """The run that has a checkpoint, RUN of RUN/checkpoints/STEP; its folder may be named by a link."""
    return folder.resolve().parent.parent


def or_empty(read: Callable[[Path], Section], place: Path) -> Section:
    """What `read` finds at a place; empty where it is missing or unreadable, for readers that can do without."""
    try:
        return read(place)
    except (FileNotFoundError, Unreadable):
        return {}


def or_refuse(read: Callable[[Path], T], place: Path, start: str) -> T:
    """What `read` finds at a place; UserError, with `start` before the reason, where it is missing or unreadable."""
    try:
        return read(place)
    except FileNotFoundError:
        raise UserError(f"{start}: there is no such file") from None
    except Unreadable as reason:
        raise UserError(f"{start}: {reason}") from None
