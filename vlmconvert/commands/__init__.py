"""The commands, one file each. Heavy libraries are imported where a command uses them, so that --help answers at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from manifests.errors import BadInputError

__all__ = [
    "COMMANDS",
    "at_least",
    "check_new_file",
    "device_options",
    "parse_counts",
    "parse_ov_config",
    "parse_size",
    "refuse_options",
]

# Name -> where the command lives; a file is imported only when its command is named, or for --help's list.
COMMANDS = {
    "run": "vlmconvert.commands.run:run",
    "demo": "vlmconvert.commands.demo:demo",
    "evaluate": "vlmconvert.commands.evaluate:evaluate",
    "check": "vlmconvert.commands.check:check",
    "bench": "vlmconvert.commands.bench:bench",
    "verify": "vlmconvert.commands.verify:verify",
    "describe": "vlmconvert.commands.describe:describe",
    "referee": "vlmconvert.commands.referee:referee",
    "report": "vlmconvert.commands.report:report",
}


def at_least(name: str, value: int, least: int) -> None:
    """Refuse an option's value below `least`."""
    if value < least:
        raise BadInputError(f"--{name.replace('_', '-')} {value} is too small: use {least} or more")


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs an artifact: `device`, `ov_config`, `cache_dir`."""
    options = (
        click.option("--device", default="CPU", show_default=True, help="OpenVINO device: CPU, GPU, GPU.1, AUTO, ..."),
        click.option(
            "--ov-config", multiple=True, metavar="KEY=VALUE", help="OpenVINO compile option; may be repeated."
        ),
        click.option("--cache-dir", type=click.Path(path_type=Path), help="Where OpenVINO keeps compiled models."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def parse_ov_config(entries: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` entries as OpenVINO takes them.

    Raises:
        BadInputError: if an entry has no value.
    """
    options = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise BadInputError(f"--ov-config {entry} is not KEY=VALUE: write for example INFERENCE_NUM_THREADS=4")
        options[key] = value
    return options


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    """The numbers of a list such as 1,2,4, each once and in order.

    Raises:
        BadInputError: if a part is no whole number from 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadInputError(f"--{name} {text} is no list of whole numbers from 1: write it as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


def refuse_options(names: Iterable[str], reason: str) -> None:
    """Refuse options of the running command that were typed and that something else has no use for.

    Args:
        names: the options' names as parameters.
        reason: what they do not go with.
    """
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise BadInputError(f"{options[name]} does not go with {reason}: leave it out")


def require_options(names: Iterable[str], reason: str) -> None:
    """Ask for options of the running command that have a default but must be typed.

    Args:
        names: the options' names as parameters.
        reason: what needs them.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            raise BadInputError(f"--{name.replace('_', '-')} is missing: give it with {reason}")


def parse_size(name: str, text: str) -> int:
    """The bytes of a size such as 4GB, 500MB or 1000.

    Raises:
        BadInputError: if it is none.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?B?)", text.strip().upper())
    if match is None or match[2] not in units:
        raise BadInputError(f"--{name.replace('_', '-')} {text} is no size: write it as 4GB or 500MB")
    return int(float(match[1]) * units[match[2]])


def check_new_file(name: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before the work whose result it takes."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise BadInputError(f"--{name} {path} cannot be written: give a file in a folder that exists")
