"""ONNX Runtime, which computes the graphs of ONNX artifacts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import BadInputError
from passes.onnx.file import check_weights_beside
from passes.onnx.session import OnnxSession
from vlmconvert.targets.runtime import Value

__all__ = ["OnnxRuntime", "open_runtime"]


class OnnxGraph:
    """A graph in an ONNX Runtime session; see `passes.onnx.session.OnnxSession`."""

    def __init__(self, file: Path) -> None:
        self._session = OnnxSession(file)
        self.outputs = self._session.outputs

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """See `Graph`; the outputs are `OrtValue`s."""
        made: dict[str, Value] = self._session.infer(values, values.get("beam_idx"))
        return made

    def reset(self) -> None:
        """See `Graph`."""
        self._session.reset()


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    device = "CPU"

    def open(self, file: Path, shared: Collection[str] = ()) -> OnnxGraph:
        """See `Runtime`."""
        check_weights_beside(file)
        return OnnxGraph(file)

    def to_host(self, value: Value) -> np.ndarray:
        """See `Runtime`."""
        return value if isinstance(value, np.ndarray) else value.numpy()


def open_runtime(device: str, config: Mapping[str, Any], cache_dir: Path | None) -> OnnxRuntime:
    """Open ONNX Runtime on the CPU.

    Raises:
        BadInputError: if another device is requested, or an option of OpenVINO is given.
    """
    if device not in {"CPU", "AUTO"}:
        raise BadInputError(
            f"ONNX artifacts run on the CPU, not on {device}: use --device CPU, or convert with --target openvino"
        )
    if config or cache_dir is not None:
        raise BadInputError(
            "--ov-config and --cache-dir are options of OpenVINO, but this is an ONNX artifact: leave them out"
        )
    return OnnxRuntime()
