"""The store: results of passes, kept by the hash of everything that made them.

An entry is a folder. It is built under a temporary name and renamed when whole, so a name always stands for a finished
result and a failure is never stored. A run that was killed finds what it had finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Store", "default_store", "digest", "library_versions"]

# Libraries whose version can change a result.
_LIBRARIES = ("numpy", "nncf", "openvino", "pillow", "safetensors", "torch", "transformers")
_MORE = {
    "openvino": ("openvino-tokenizers",),
    "onnx": ("onnx", "onnx-ir", "onnxscript"),
    "msmodelslim": ("msmodelslim",),
}


def library_versions(target: str = "openvino") -> dict[str, str]:
    """Installed versions of the libraries that a result depends on; read from metadata, nothing is imported.

    Args:
        target: what is made, or `msmodelslim` for what that engine makes.
    """
    versions = {}
    for name in (*_LIBRARIES, *_MORE.get(target, ())):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def digest(*parts: Any) -> str:
    """SHA-256 of JSON-able parts, as 64 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_store() -> Path:
    """`$XDG_CACHE_HOME/vlmconvert`, by default `~/.cache/vlmconvert`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmconvert"


@dataclass(frozen=True)
class Store:
    """Entries below one folder. Picklable, so workers in other processes write into the same store."""

    root: Path

    def path(self, key: str) -> Path:
        """Where the entry of `key` lies or would lie."""
        return self.root / key[:2] / key

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_dir()

    def get_or_make(self, key: str, make: Callable[[Path], None]) -> Path:
        """The entry of `key`; if there is none, `make` fills an empty folder that then becomes the entry.

        Whatever `make` raises passes through, and nothing is stored.
        """
        entry = self.path(key)
        if entry.is_dir():
            return entry
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=entry.parent))
        try:
            make(temporary)
            try:
                os.rename(temporary, entry)
            except OSError:
                # Another process finished the same entry first; both are equal.
                if not entry.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return entry

    def remove(self, key: str) -> None:
        """Forget an entry; unknown keys are fine."""
        shutil.rmtree(self.path(key), ignore_errors=True)
