"""Opened checkpoints for tests that look at their parts."""

from __future__ import annotations

from pathlib import Path

from passes.store import Store
from vlmconvert.console import Reporter
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.open import find_checkpoint, open_model
from vlmconvert.families.opened import OpenedModel

__all__ = ["opened_model"]


def opened_model(folder: Path, store: Path) -> OpenedModel:
    """A checkpoint with its blocks traced and its config completed."""
    with Helper() as helper:
        return open_model(*find_checkpoint(str(folder)), helper, Store(store), Reporter()).completed()
