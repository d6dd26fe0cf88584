"""Checking the free disk space before any work, and the size of the store after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from manifests.errors import BadInputError
from manifests.files import UNFINISHED
from manifests.leftovers import temporary_folder
from passes.store import Entry, Store
from vlmconvert.console import Reporter, format_size
from vlmconvert.conversion.lock import alone_in_store
from vlmconvert.options import parse_size

__all__ = ["check_disk", "entries_text", "on_one_disk", "prune_store", "store_limit"]

_LIMIT = "VLMCONVERT_STORE_LIMIT"
# Seconds for which an entry must not have been used: another conversion may be running.
_UNUSED = 3600


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether two folders, which need not exist, are on one disk."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def check_disk(needed: Mapping[Path, int], options: Sequence[str]) -> None:
    """Refuse to start a conversion for which the free disk space is too small.

    Args:
        needed: folder -> bytes that are needed there.
        options: the options of the command line that choose the folders.

    Raises:
        BadInputError: if a folder has less free space; the error says how much is needed.
    """
    for place, size in needed.items():
        free = shutil.disk_usage(_existing(place)).free
        if free < size:
            raise BadInputError(
                f"{place} has {format_size(free)} free, and the conversion needs about {format_size(size)}: free some space, or "
                f"choose another folder with {' and '.join(options)}"
            )


def _existing(place: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    return next(path for path in (place, *place.resolve().parents) if path.exists())


def check_store(store: Store) -> None:
    """Make the folder of the store, and refuse one in which nothing can be written.

    Raises:
        BadInputError: with the reason.
    """
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        with temporary_folder(store.root, UNFINISHED):
            pass
    except OSError as error:
        raise BadInputError(
            f"the store {store.root} cannot be used ({error.strerror}): choose another folder with --store"
        ) from None


def store_limit() -> int:
    """Maximum number of bytes that the store may have after a conversion, from the environment or 100 GB.

    Raises:
        BadInputError: if the environment variable is not a size.
    """
    text = os.environ.get(_LIMIT) or "100GB"
    try:
        return parse_size("limit", text)
    except BadInputError:
        raise BadInputError(
            f"the environment variable {_LIMIT} is {text}, which is not a size: write it as 4GB or 500MB"
        ) from None


def prune_store(store: Store, limit: int, reporter: Reporter) -> None:
    """Remove the entries that have not been used for the longest time, if the store is larger than its limit.

    Nothing is removed while another process uses the store.
    """
    with alone_in_store(store) as alone:
        removed = store.prune(limit, _UNUSED) if alone else []
    if removed:
        reporter.log(f"store: removed the oldest {entries_text(removed)}, to keep it below {format_size(limit)}")


def entries_text(entries: Sequence[Entry]) -> str:
    """Number and size of entries of the store: `2 entries, 4 kB`."""
    size = format_size(sum(entry.size for entry in entries))
    return f"{len(entries)} entr{'y' if len(entries) == 1 else 'ies'}, {size}"
