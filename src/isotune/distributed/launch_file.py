"""accelerate's configuration file, checked before anything is started with it: accelerate takes values as they are."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from isotune.io.reading import checked, read_yaml_object
from isotune.io.variables import MAX_PROCESSES

Processes = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]


@with_config(ConfigDict(extra="allow"))
class LaunchFile(TypedDict, total=False):
    """The keys that decide a launch; its other keys are accelerate's own."""

    compute_environment: str | None
    distributed_type: str | bool | None  # YAML reads NO as false
    num_processes: Processes | None
    num_machines: Processes | None
    machine_rank: Annotated[int, Field(ge=0, le=MAX_PROCESSES)] | None
    main_process_port: Annotated[int, Field(ge=0, le=65_535)] | None
    main_process_ip: str | None
    mixed_precision: str | bool | None
    use_cpu: bool | None
    deepspeed_config: dict[str, str | int | float | bool | None] | None
    fsdp_config: dict[str, Any] | None


_SCHEMA = TypeAdapter(LaunchFile)


def read_launch_file(file: Path) -> dict[str, Any]:
    """The keys of accelerate's file.

    FileNotFoundError, or Unreadable where it is no YAML with keys, or a value is none that its key takes.
    """
    return dict(checked(read_yaml_object(file), _SCHEMA))
