"""The commands, one file each. Heavy libraries are imported where a command uses them, so that --help answers at once."""

from __future__ import annotations

from manifests.errors import BadInputError

__all__ = ["COMMANDS", "at_least"]

# Name -> where the command lives; a file is imported only when its command is named, or for --help's list.
COMMANDS = {
    "run": "vlmconvert.commands.run:run",
    "verify": "vlmconvert.commands.verify:verify",
}


def at_least(name: str, value: int, least: int) -> None:
    """Refuse an option's value below `least`."""
    if value < least:
        raise BadInputError(f"--{name.replace('_', '-')} {value} is too small: use {least} or more")
