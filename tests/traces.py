"""ONNX traces of all tests in one place: to export the same blocks takes longer than most tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from passes.onnx.trace import VERSION
from passes.store import digest
from passes.vocabulary import Component

__all__ = ["keep_traces"]


def keep_traces(
    shared: Path, trace: Callable[..., None], config: dict[str, Any], components: tuple[Component, ...], output: Path
) -> None:
    """Trace the kinds of some components, or copy what any test process has traced.

    Args:
        shared: folder that all test processes share.
        trace: `passes.onnx.trace.trace_kinds`, or a call of it in another process.
        config: the completed config.
        components: hold the kinds.
        output: folder for the traces.
    """
    kinds = sorted({repr(kind) for component in components for kind in component.kinds.values()})
    kept = shared / digest(VERSION, config, kinds)
    if not kept.is_dir():
        shared.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=shared))
        trace(config, components, made)
        if not kept.is_dir():
            made.rename(kept)
    shutil.copytree(kept, output, dirs_exist_ok=True)
