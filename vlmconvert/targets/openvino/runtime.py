"""OpenVINO, which computes the graphs of OpenVINO artifacts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import passes  # noqa: F401  keeps telemetry off before openvino is imported
from manifests.errors import BadInputError
from vlmconvert.targets.runtime import Value

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["OpenvinoGraph", "OpenvinoRuntime", "resolve_device"]


class OpenvinoRuntime:
    """OpenVINO on one device.

    Args:
        device: OpenVINO device name; AUTO is the first GPU or, without a GPU, the CPU.
        ov_config: OpenVINO compile options. By default, activations are float32 (`EXECUTION_MODE_HINT` ACCURACY), so that
            figures do not depend on what the processor supports.
        cache_dir: folder where OpenVINO keeps compiled models.

    Raises:
        BadInputError: if OpenVINO does not have the device.
    """

    def __init__(
        self, device: str = "CPU", ov_config: Mapping[str, Any] | None = None, cache_dir: Path | None = None
    ) -> None:
        import openvino as ov

        self._core = ov.Core()
        self.device = resolve_device(self._core, device)
        self._options = {"EXECUTION_MODE_HINT": "ACCURACY", **(ov_config or {})}
        if self.device == "CPU" and "EXECUTION_MODE_HINT" not in (ov_config or {}):
            # With the hint alone, a CPU that knows float16 decompresses weights in it, outside its fused layers.
            self._options.setdefault("INFERENCE_PRECISION_HINT", "f32")
        if cache_dir is not None:
            self._options["CACHE_DIR"] = str(cache_dir)

    def open(self, file: Path, shared: Collection[str] = ()) -> OpenvinoGraph:
        """See `Runtime`."""
        try:
            compiled = self._core.compile_model(file, self.device, self._options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise BadInputError(
                f"OpenVINO cannot compile {file} for {self.device} ({reason}): choose another --device or --ov-config"
            ) from error
        return OpenvinoGraph(self._core, self.device, file, compiled, shared)

    def to_host(self, value: Value) -> np.ndarray:
        """See `Runtime`."""
        import openvino as ov

        if isinstance(value, ov.RemoteTensor):
            host = ov.Tensor(value.get_element_type(), value.get_shape())
            value.copy_to(host)
            return host.data
        return np.array(value.data) if isinstance(value, ov.Tensor) else value


class OpenvinoGraph:
    """A compiled model with one inference request; see `Graph`."""

    def __init__(
        self, core: ov.Core, device: str, file: Path, compiled: ov.CompiledModel, shared: Collection[str]
    ) -> None:
        self._core, self._device, self._file = core, device, file
        self.request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self.outputs = sorted(name for port in compiled.outputs for name in port.get_names())
        self._shared = [name for name in self.outputs if name in shared]
        self._given: dict[str, Value] = {}
        self._arrays: dict[str, np.ndarray] = {}

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """See `Graph`; the outputs are the tensors of the inference request."""
        import openvino as ov

        for name, value in values.items():
            if name not in self._inputs or self._given.get(name) is value:
                continue
            self._given[name] = tensor = value
            if isinstance(value, np.ndarray):
                # The array is kept alive, because the tensor shares its memory.
                self._arrays[name] = np.ascontiguousarray(value)
                tensor = ov.Tensor(self._arrays[name], shared_memory=True)
            self.request.set_tensor(name, tensor)
        if self._shared and self._device.startswith("GPU"):
            self._place_on_device()
        self.request.infer()
        return {name: self.request.get_tensor(name) for name in self.outputs}

    def reset(self) -> None:
        """See `Graph`."""
        self.request.reset_state()

    def _place_on_device(self) -> None:
        """Place the shared outputs in the memory of the GPU, where the next graph reads them."""
        context = self._core.get_default_context(self._device)
        model = self._core.read_model(self._file)
        model.reshape({name: list(self.request.get_tensor(name).get_shape()) for name in self._given})
        for name in self._shared:
            port = model.output(name)
            self.request.set_tensor(name, context.create_tensor(port.element_type, port.shape, {}))


def resolve_device(core: ov.Core, device: str) -> str:
    """Choose a device for a name such as AUTO or AUTO:GPU,CPU: the first GPU in it, else the first device.

    Graphs can share memory only on the same device, and OpenVINO's own AUTO may choose different devices for them.

    Raises:
        BadInputError: if OpenVINO has none of the devices.
    """
    kind, _, listed = device.partition(":")
    if kind != "AUTO":
        return device
    available = list(core.available_devices)
    candidates = [name for name in listed.split(",") if name] or available
    matching = [name for wanted in candidates for name in available if name == wanted or name.split(".")[0] == wanted]
    if not matching:
        raise BadInputError(f"OpenVINO has no device of {device}: use one of {', '.join(available)}")
    return next((name for name in matching if name.startswith("GPU")), matching[0])
