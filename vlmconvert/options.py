"""Options that a precision or a target brings to the command line, to recipes and to `vlmconvert.convert`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from manifests.errors import BadInputError
from passes.base import WANTED

__all__ = ["Option", "parse_size", "read_options"]

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": base**power for power, letter in enumerate("KMGT", 1) for end, base in (("B", 1000), ("IB", 1024))
}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: name of the parameter in Python, such as `group_size`; the command line calls it `--group-size`.
        kind: type of the value; `size` is a number of bytes, written as 4GB.
        help: what the option does, in one sentence.
        default: value of an option that is not given; None leaves the choice to the pass.
        choices: the values that an option of kind `str` allows; empty if it allows any text.
        negatable: whether a flag has a `--no-` form.
        in_passes: whether the option only chooses passes; a recipe lists the passes and leaves such an option out.
    """

    name: str
    kind: type[bool] | type[int] | type[float] | type[str] | str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    negatable: bool = False
    in_passes: bool = False

    @property
    def flag(self) -> str:
        """The option as it is written on the command line, such as `--group-size`."""
        return f"--{self.name.replace('_', '-')}"

    def read(self, value: Any) -> Any:
        """Check a value, and convert it to the option's kind.

        Raises:
            BadInputError: if the value is not of that kind, or not among the choices.
        """
        if self.kind == "size":
            return value if type(value) is int else parse_size(self.name, value)
        kind: Any = self.kind
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise BadInputError(f"{self.flag} {value!r} cannot be used: give {WANTED[kind.__name__]}")
        if self.choices and value not in self.choices:
            raise BadInputError(f"{self.flag} {value} is unknown: use {', '.join(self.choices)}")
        return kind(value)


def read_options(options: Iterable[Option], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The value of every option: the given value, or the default.

    Args:
        options: the options that exist.
        values: option name -> given value; None means that the option was not given.
        owner: what the error calls the owner of the options, such as `--target onnx`.

    Raises:
        BadInputError: if there is no option of a given name, or a value is of the wrong kind.
    """
    known = {option.name: option for option in options}
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in known:
            mend = f"its options are {', '.join(known)}" if known else "leave it out"
            raise BadInputError(f"{owner} has no option {name}: {mend}")
    return {name: option.read(given[name]) if name in given else option.default for name, option in known.items()}


def parse_size(name: str, text: Any) -> int:
    """The number of bytes of a size such as 4GB, 8GiB, 500MB or 1000.

    Args:
        name: name of the option, for the error.
        text: the size.

    Raises:
        BadInputError: if it is not a text, or not the text of a size.
    """
    match = isinstance(text, str) and re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?I?B|)", text.strip().upper())
    if not match or match[2] not in _UNITS:
        raise BadInputError(f"--{name.replace('_', '-')} {text} is not a size: write it as 4GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
