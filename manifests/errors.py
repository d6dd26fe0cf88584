"""The errors that reach a user: one sentence that says what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
from typing import ClassVar

__all__ = ["BadInputError", "CheckFailedError", "ConversionError", "VlmConvertError", "is_disk_full", "printable"]


# Characters of the longest message: what a message quotes from a file may be of any length.
_LONGEST = 1000


def printable(text: str, instead: str) -> str:
    """A text with something else in the place of characters that are not printable."""
    return "".join(letter if letter.isprintable() else instead for letter in text)


class VlmConvertError(Exception):
    """Base class of every expected failure; `exit_code` is the exit status of the command line."""

    exit_code: ClassVar[int] = 3

    def __str__(self) -> str:
        """The message as one line of printable characters, since names in a file may hold line ends or terminal commands."""
        text = printable(super().__str__(), " ")
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class CheckFailedError(VlmConvertError):
    """A measured figure is outside its limit."""

    exit_code = 1


class BadInputError(VlmConvertError):
    """The checkpoint, an option or a file cannot be used as given; raised before any work starts."""

    exit_code = 2


class ConversionError(VlmConvertError):
    """A pass could not do its work on an input that looked right."""

    exit_code = 3


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, was raised because a disk is full or a quota is used up.

    Libraries in native code, and other processes, pass on only the text of the system's error.
    """
    while True:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if "No space left on device" in str(error):
            return True
        cause = error.__cause__ or error.__context__
        if cause is None:
            return False
        error = cause
