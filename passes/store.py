"""The store: results of passes, kept by the hash of everything that they depend on.

An entry is a folder. It is made under a temporary name, flushed to the disk and renamed when it is complete, so the store holds
only finished results and never a failure. After a run was killed, the next one finds what had been finished. Checksums lie
beside an entry: every process compares them before it uses the entry for the first time, and a damaged entry is made again.
The time of the last change of an entry's folder is that of its last use.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from manifests.files import remove_tree, sync_tree
from manifests.leftovers import remove_leftovers, temporary_folder

__all__ = ["Entry", "Store", "default_store", "digest", "library_versions"]

# Beginning of the names of folders that will be entries.
_TEMPORARY = ".making-"
# Libraries whose version can change a result.
_CHUNK = 1 << 20
# Entries that this process has made or compared with their checksums.
_intact: set[Path] = set()
_LIBRARIES = ("numpy", "nncf", "openvino", "pillow", "safetensors", "torch", "transformers")


def library_versions(*more: str) -> dict[str, str]:
    """Installed versions of the libraries that a result depends on, read from metadata without importing them.

    Args:
        more: further packages that this result depends on.
    """
    versions = {}
    for name in (*_LIBRARIES, *more):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold, as 64 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_store() -> Path:
    """`$XDG_CACHE_HOME/vlmconvert`, by default `~/.cache/vlmconvert`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmconvert"


@dataclass(frozen=True)
class Entry:
    """An entry of the store.

    Attributes:
        key: its key.
        what: what it is, in a few words; empty if nobody said.
        size: number of bytes of its files.
        used: time of its last use, in seconds since the epoch.
    """

    key: str
    what: str
    size: int
    used: float


@dataclass(frozen=True)
class Store:
    """Entries below one folder. Picklable, so workers in other processes write into the same store.

    Attributes:
        root: the folder.
        owner: whose results are made, such as the name of a checkpoint; it becomes part of what an entry says it is.
    """

    root: Path
    owner: str = ""

    def path(self, key: str) -> Path:
        """The folder of the entry of `key`, whether it exists or not."""
        return self.root / key[:2] / key

    def __contains__(self, key: str) -> bool:
        """Whether the store has an intact entry; a damaged one is removed."""
        entry = self.path(key)
        if not entry.is_dir():
            return False
        if entry not in _intact:
            try:
                expected = json.loads(self._checksums(key).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                expected = None
            if expected != _digests(entry):
                self.remove(key)
                return False
            _intact.add(entry)
        return True

    def get_or_make(self, key: str, make: Callable[[Path], None], what: str = "", lasting: bool = True) -> Path:
        """The entry of `key`; if it does not exist, `make` fills an empty folder, which becomes the entry.

        If `make` raises an exception, nothing is stored.

        Args:
            key: the key.
            make: takes the empty folder.
            what: what the entry is, in a few words, for people who look at the store.
            lasting: whether the entry must survive a power cut; to wait for the disk takes long for what is removed soon.
        """
        entry = self.path(key)
        if key in self:
            with suppress(OSError):  # of another user
                os.utime(entry)
            return entry
        entry.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(entry.parent, _TEMPORARY) as temporary:
            make(temporary)
            if what:
                self._label(key).write_text(self._owned(what), encoding="utf-8")
            self._checksums(key).write_text(json.dumps(_digests(temporary)), encoding="utf-8")
            if lasting:
                sync_tree(temporary)
            try:
                os.rename(temporary, entry)
            except OSError:
                # Another process finished the same entry first; both are equal.
                if not entry.is_dir():
                    raise
        _intact.add(entry)
        return entry

    def remove(self, key: str) -> None:
        """Remove an entry, if it exists."""
        _intact.discard(self.path(key))
        with suppress(OSError):
            remove_tree(self.path(key))
        for beside in (self._label(key), self._checksums(key)):
            with suppress(OSError):
                beside.unlink()

    def entries(self) -> list[Entry]:
        """All entries; the one that was used last comes last."""
        return sorted(self._entries(), key=lambda entry: entry.used)

    def size(self) -> int:
        """Bytes of all entries of this owner."""
        return sum(entry.size for entry in self._entries() if entry.what.startswith(self._owned("")))

    def prune(self, limit: int, unused: float = 0) -> list[Entry]:
        """Remove the entries that have not been used for the longest time, until the others take at most `limit` bytes.

        Args:
            limit: maximum number of bytes.
            unused: number of seconds for which an entry must not have been used.

        Returns:
            The removed entries.
        """
        entries = self.entries()
        size = sum(entry.size for entry in entries)
        latest = time.time() - unused
        removed = []
        for entry in entries:
            if size <= limit or entry.used > latest:
                break
            self.remove(entry.key)
            removed.append(entry)
            size -= entry.size
        return removed

    def remove_leftovers(self) -> int:
        """Remove what killed processes have left unfinished; returns how many entries that were."""
        folders = [path for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []
        return sum(remove_leftovers(folder, _TEMPORARY) for folder in folders)

    def _entries(self) -> Iterator[Entry]:
        for path in self.root.glob("[0-9a-f][0-9a-f]/" + "[0-9a-f]" * 64):
            with suppress(OSError):  # removed meanwhile
                label = self._label(path.name)
                what = label.read_text(encoding="utf-8") if label.exists() else ""
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                yield Entry(path.name, what, size, path.stat().st_mtime)

    def _owned(self, what: str) -> str:
        return f"{self.owner}: {what}" if self.owner else what

    def _label(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.txt"

    def _checksums(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.json"


def _digests(entry: Path) -> dict[str, str]:
    """File of an entry -> checksum of its bytes: XXH3, which finds damage about as fast as a file can be read."""
    return {path.relative_to(entry).as_posix(): _digest(path) for path in sorted(entry.rglob("*")) if path.is_file()}


def _digest(path: Path) -> str:
    import xxhash

    found = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
