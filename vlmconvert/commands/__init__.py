"""The commands, one file each. Heavy libraries are imported where a command uses them, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from manifests.errors import BadInputError

__all__ = ["COMMANDS", "at_least", "counts", "new_file", "ov_options"]

# Name -> where the command lives; a file is imported only when its command is named, or for --help's list.
COMMANDS = {
    "run": "vlmconvert.commands.run:run",
    "bench": "vlmconvert.commands.bench:bench",
    "check": "vlmconvert.commands.check:check",
}


def at_least(name: str, value: int, least: int) -> None:
    """Refuse an option's value below `least`."""
    if value < least:
        raise BadInputError(f"--{name.replace('_', '-')} {value} is too small: use {least} or more")


def counts(name: str, text: str) -> tuple[int, ...]:
    """The numbers of a list such as 1,2,4, each once and in order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadInputError(f"--{name} {text} is no list of whole numbers from 1: write it as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


def ov_options(values: Iterable[str]) -> dict[str, str]:
    """OpenVINO compile options from KEY=VALUE texts."""
    options = {}
    for text in values:
        key, sign, value = text.partition("=")
        if not (key and sign):
            raise BadInputError(f"--ov-config {text} has no value: write it as KEY=VALUE")
        options[key] = value
    return options


def new_file(name: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before the work whose result it takes."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise BadInputError(f"--{name} {path} cannot be written: give a file in a folder that exists")
