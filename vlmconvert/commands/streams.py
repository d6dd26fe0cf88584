"""Standard input, output and error as users leave them: closed, a broken pipe, or in another encoding than UTF-8."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from manifests.errors import BadInputError

__all__ = ["checked_text", "open_streams", "read_input", "read_line", "silence"]

_MEND = "save it as UTF-8"


def open_streams() -> None:
    """Open what is closed, so that no file gets its number and the output with it, and let every character be printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  it stays open
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a stand-in, as tests have it
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def silence(stream: TextIO) -> None:
    """Let everything that is still written to a stream vanish, also what Python flushes at its end."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def read_input() -> str:
    """Read all of standard input.

    Raises:
        BadInputError: if it is no text in UTF-8.
    """
    return _decoded(sys.stdin.buffer.read())


def read_line() -> str:
    """Read the next line of standard input; empty at its end.

    Raises:
        BadInputError: if it is no text in UTF-8.
    """
    return _decoded(sys.stdin.buffer.readline())


def checked_text(text: str, where: str) -> str:
    """A text from the command line.

    Raises:
        BadInputError: if its bytes were no UTF-8, which Python keeps in a form that no tokenizer takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInputError(f"{where} is no text in UTF-8: write it in UTF-8") from None
    return _without_zeros(text, where)


def _decoded(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(f"standard input is no text in UTF-8 (byte {error.start}): {_MEND}") from None
    return _without_zeros(text, "standard input").strip()


def _without_zeros(text: str, where: str) -> str:
    if "\0" in text:
        raise BadInputError(f"{where} holds zero bytes, so it is no text: {_MEND}")
    return text
