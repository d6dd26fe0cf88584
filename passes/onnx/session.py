"""One ONNX graph in ONNX Runtime, with inputs and outputs by name; it keeps the key-value cache between calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import BadInputError

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

__all__ = ["OnnxSession"]

_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxSession:
    """A graph on ONNX Runtime's CPU provider.

    The inputs `past_key_values.N.key` and `.value` are fed with the outputs `present.N.key` and `.value` of the last call,
    without a copy; the caller sees neither of them. The cache starts empty.

    Attributes:
        inputs: names of the inputs that a call takes, in the order of the graph.
        outputs: names of the outputs that a call returns.

    Args:
        graph: the .onnx file, whose weights lie beside it, or a graph in memory.
        weights: the folder with the weights of a graph in memory.
        options: entries of ONNX Runtime's session configuration.
        threads: number of threads for one operator; 0 for all cores.

    Raises:
        BadInputError: if ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        graph: Path | onnx.ModelProto,
        weights: Path | None = None,
        options: Mapping[str, str] | None = None,
        threads: int = 0,
    ) -> None:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        for name, value in (options or {}).items():
            settings.add_session_config_entry(name, value)
        if weights is not None:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        source = graph if isinstance(graph, Path) else graph.SerializeToString()
        try:
            self._session = ort.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            reason = " ".join(str(error).split())
            place = graph if isinstance(graph, Path) else graph.graph.name
            raise BadInputError(
                f"ONNX Runtime {ort.__version__} cannot load {place} ({reason}): use a newer one, or convert again"
            ) from error
        ports = self._session.get_inputs()
        self._caches = {port.name: port for port in ports if port.name.startswith(_PAST)}
        self._presents = {name: _PRESENT + name.removeprefix(_PAST) for name in self._caches}
        self.inputs = [port.name for port in ports if port.name not in self._caches]
        self._all_outputs = [port.name for port in self._session.get_outputs()]
        self.outputs = [name for name in self._all_outputs if name not in self._presents.values()]
        self._state: dict[str, ort.OrtValue] = {}

    def reset(self) -> None:
        """Empty the cache."""
        self._state = {}

    def infer(self, inputs: Mapping[str, Any], beam_idx: np.ndarray | None = None) -> dict[str, ort.OrtValue]:
        """Run the graph once.

        Args:
            inputs: an array or an `OrtValue` for each of `self.inputs`; other entries are ignored.
            beam_idx: [batch], the row of the cache that each row continues; by default, its own.

        Returns:
            Name of an output -> its value; `.numpy()` returns the array.
        """
        import onnxruntime as ort

        feeds = {
            name: _on_host(inputs[name]) if isinstance(inputs[name], np.ndarray) else inputs[name]
            for name in self.inputs
        }
        if self._caches and not self._state:
            self._state = self._empty(feeds[self.inputs[0]].shape()[0])
        if beam_idx is not None and not np.array_equal(beam_idx, np.arange(len(beam_idx))):
            self._state = {
                name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[beam_idx]))
                for name, value in self._state.items()
            }
        values = self._session.run_with_ort_values(self._all_outputs, {**feeds, **self._state})
        results = dict(zip(self._all_outputs, values, strict=True))
        self._state = {name: results.pop(present) for name, present in self._presents.items()}
        return results

    def _empty(self, batch: int) -> dict[str, ort.OrtValue]:
        state = {}
        for name, port in self._caches.items():
            shape = [batch, *(size if isinstance(size, int) else 0 for size in port.shape[1:])]
            state[name] = _on_host(np.zeros(shape, _DTYPES[port.type]))
        return state


def _on_host(array: np.ndarray) -> ort.OrtValue:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
