"""Lines of files that may hold anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from manifests.errors import BadInputError
from manifests.files import open_file

__all__ = ["LONGEST_LINE", "lines"]

# Limit in bytes, so that a file without newlines is not read into memory as one line.
LONGEST_LINE = 128 * 2**20


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), byte offset and content of every line.

    Raises:
        BadInputError: if the file cannot be read, or a line is too long.
    """
    try:
        with open_file(path) as stream:
            number = offset = 0
            while line := stream.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise BadInputError(
                        f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MiB: end each entry by a newline"
                    )
                yield number, offset, line
                offset += len(line)
    except FileNotFoundError:
        raise BadInputError(f"{path} does not exist: correct the path") from None
    except OSError as error:
        raise BadInputError(f"{path} cannot be read ({error}): use another file") from error
