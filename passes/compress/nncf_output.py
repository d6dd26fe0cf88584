"""Keeping NNCF's own output off the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

__all__ = ["quiet_nncf"]


@contextmanager
def quiet_nncf() -> Iterator[None]:
    """Keep NNCF's progress bars and messages off the terminal, where vlmconvert shows its own progress."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(StringIO()):
        yield
