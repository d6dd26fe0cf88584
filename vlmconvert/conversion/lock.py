"""Locks in the store, so that two conversions at the same time do not get in each other's way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from manifests.errors import BadInputError
from passes.store import Store, digest
from vlmconvert.console import Reporter

__all__ = ["alone_in_store", "one_conversion", "one_writer"]

_FOLDER = "locks"


@contextmanager
def one_conversion(store: Store, identity: str, reporter: Reporter) -> Iterator[None]:
    """Wait until no other process converts the same checkpoint with the same store.

    Two of them would make the same results twice, and the first to end would remove activations that the other one reads.

    Args:
        store: the store.
        identity: digest of what all results of the checkpoint depend on.
        reporter: tells that the process waits.
    """
    lock = _lock(store, identity)
    if not _acquired(lock):
        reporter.say("waiting for another vlmconvert, which converts the same checkpoint with the same store ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_writer(store: Store, output: Path) -> Iterator[None]:
    """Refuse to write an output that another process is writing.

    Raises:
        BadInputError: if there is such a process.
    """
    lock = _lock(store, digest("output", str(output.resolve())))
    if not _acquired(lock):
        raise BadInputError(
            f"another vlmconvert is writing {output}: wait until it has ended, or choose another folder with --output"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_in_store(store: Store) -> Iterator[bool]:
    """Keep other conversions with the same store from starting; yields False if there are some already."""
    with ExitStack() as held:
        for path in sorted((store.root / _FOLDER).glob("*.lock")):
            lock = FileLock(path)
            if not _acquired(lock):
                yield False
                return
            held.callback(lock.release)
        yield True


def _lock(store: Store, name: str) -> FileLock:
    folder = store.root / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def _acquired(lock: FileLock) -> bool:
    """Whether this process holds the lock now; on a file system without locks, it always does."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except NotImplementedError:
        return True
    return True
