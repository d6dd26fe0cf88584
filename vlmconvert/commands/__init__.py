"""The commands, one file for each. Heavy libraries are imported by the function that uses them, so that --help answers at once."""

from __future__ import annotations

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
    "machine_options",
    "parse_counts",
    "parse_ov_config",
    "refuse_options",
]

# Command -> its module and attribute. A module is imported when its command is used, and all of them for the list in --help.
COMMANDS = {
    "families": "vlmconvert.commands.families:families",
    "build": "vlmconvert.commands.build:build",
    "recipe": "vlmconvert.commands.recipe:recipe",
    "run": "vlmconvert.commands.run:run",
    "demo": "vlmconvert.commands.demo:demo",
    "evaluate": "vlmconvert.commands.evaluate:evaluate",
    "check": "vlmconvert.commands.check:check",
    "bench": "vlmconvert.commands.bench:bench",
    "verify": "vlmconvert.commands.verify:verify",
    "sign": "vlmconvert.commands.sign:sign",
    "bom": "vlmconvert.commands.bom:bom",
    "describe": "vlmconvert.commands.describe:describe",
    "referee": "vlmconvert.commands.referee:referee",
    "report": "vlmconvert.commands.report:report",
    "cache": "vlmconvert.commands.cache:cache",
}


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a value of an option that is smaller than `least`."""
    if value < least:
        raise BadInputError(f"--{name.replace('_', '-')} {value} is too small: use {least} or more")


def machine_options() -> list[click.Option]:
    """The options of commands that convert, about the machines that do the work."""
    return [
        click.Option(
            ["--workers"],
            type=int,
            help="Number of processes that compress blocks; for ascend, number of weight files that are written at once.  "
            "[default: as many as fit the cores and the memory]",
        ),
        click.Option(
            ["--max-memory"],
            metavar="SIZE",
            help="Limit for the memory, such as 8GiB; what does not fit is refused.  [env var: VLMCONVERT_MAX_MEMORY]",
        ),
        click.Option(
            ["--cluster"],
            metavar="ADDRESS",
            help="Compress blocks on the workers of dask://HOST:PORT or ray://HOST:PORT, which share the store and the "
            "checkpoint.",
        ),
    ]


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every command has that runs an artifact: `device`, `ov_config`, `cache_dir`."""
    options = (
        click.option("--device", default="CPU", show_default=True, help="OpenVINO device: CPU, GPU, GPU.1, AUTO, ..."),
        click.option(
            "--ov-config", multiple=True, metavar="KEY=VALUE", help="OpenVINO compile option; may be repeated."
        ),
        click.option(
            "--cache-dir", type=click.Path(path_type=Path), help="Folder where OpenVINO keeps compiled models."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def parse_ov_config(entries: Iterable[str]) -> dict[str, str]:
    """Turn `KEY=VALUE` entries into OpenVINO's compile options.

    Raises:
        BadInputError: if an entry has no key or no `=`.
    """
    options = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise BadInputError(f"--ov-config {entry} is not KEY=VALUE: write, for example, INFERENCE_NUM_THREADS=4")
        options[key] = value
    return options


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    """Read a list of numbers such as 1,2,4; repeated numbers count once.

    Args:
        name: name of the option, for the error.
        text: the list.

    Raises:
        BadInputError: if a part is not a positive whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadInputError(f"--{name} {text} is not a list of positive whole numbers: write it as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


def refuse_options(names: Iterable[str], reason: str) -> None:
    """Refuse options that were typed although another option makes them useless.

    Args:
        names: names of the options as parameters of the running command.
        reason: the other option.

    Raises:
        BadInputError: if one of the options was typed.
    """
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise BadInputError(f"{options[name]} does not go with {reason}: leave it out")


def require_options(names: Iterable[str], reason: str) -> None:
    """Refuse to run without options that have a default but must be typed.

    Args:
        names: names of the options as parameters of the running command.
        reason: the other option that needs them, and why.

    Raises:
        BadInputError: if one of the options was not typed.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            raise BadInputError(f"--{name.replace('_', '-')} is missing: give it with {reason}")


def check_new_file(name: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before the work starts whose result is written to it.

    Args:
        name: name of the option that gives the file.
        path: the file; None if the option was not given.

    Raises:
        BadInputError: if the path is a folder, lies in a folder that does not exist, or cannot be written.
    """
    if path is None:
        return
    try:
        there = path.exists()
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise BadInputError(f"--{name} {path} cannot be written: give a file in a folder that exists")
        with path.open("ab"):  # only the attempt tells
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise BadInputError(f"--{name} {path} cannot be written ({error.strerror}): choose another file") from None
