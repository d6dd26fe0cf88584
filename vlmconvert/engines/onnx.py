"""Graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import BadInputError
from passes.onnx.engine import OnnxEngine
from vlmconvert.engines import Value
from vlmconvert.targets import check_installed

__all__ = ["OnnxRuntime", "open_engine"]


class OnnxGraph:
    """One session; see `passes.onnx.engine.OnnxEngine`."""

    def __init__(self, file: Path) -> None:
        self._session = OnnxEngine(file)

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """See `Graph`; outputs are `OrtValue`s."""
        made: dict[str, Value] = self._session.infer(values, values.get("beam_idx"))
        return made

    def reset(self) -> None:
        """See `Graph`."""
        self._session.reset()


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    device = "CPU"

    def open(self, file: Path, shared: Collection[str] = ()) -> OnnxGraph:
        """See `Engine`."""
        return OnnxGraph(file)

    def to_host(self, value: Value) -> np.ndarray:
        """See `Engine`."""
        return value if isinstance(value, np.ndarray) else value.numpy()


def open_engine(
    device: str = "CPU", ov_config: Mapping[str, Any] | None = None, cache_dir: Path | None = None
) -> OnnxRuntime:
    """ONNX Runtime, which takes none of OpenVINO's options.

    Raises:
        BadInputError: if another device than the CPU is asked for, or an option is OpenVINO's.
    """
    if device not in {"CPU", "AUTO"}:
        raise BadInputError(f"device {device} is not for ONNX artifacts: use CPU, or convert with --target openvino")
    check_installed("onnx")
    if ov_config or cache_dir is not None:
        raise BadInputError("--ov-config and --cache-dir are OpenVINO's, and this is an ONNX artifact: leave them out")
    return OnnxRuntime()
