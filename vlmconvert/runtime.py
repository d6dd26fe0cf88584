"""Running the graphs of a finished artifact: compile, encode images, prefill, decode."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import passes  # noqa: F401  keeps telemetry off before openvino is imported
from manifests.errors import BadInputError
from manifests.io import read_manifest
from vlmconvert.families import family_module

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Runner", "Timings", "end_tokens", "resolve_device"]


@dataclass
class Timings:
    """Seconds since the last prefill began; `vision` is 0 if the image's keys and values were there already."""

    vision: float = 0.0
    first_token: float = 0.0
    other_tokens: list[float] = field(default_factory=list)


class Runner:
    """An artifact in OpenVINO.

    Args:
        folder: the artifact; its manifest says what it holds.
        device: an OpenVINO device name; AUTO stands for the first GPU, if there is one, else the CPU.
        ov_config: OpenVINO compile options. By default graphs compute in the precision that they are stored in
            (`EXECUTION_MODE_HINT` ACCURACY), so that figures do not depend on what the processor supports.
        cache_dir: where OpenVINO keeps compiled models.

    Raises:
        BadInputError: if the folder is no artifact, or the device or an option is unknown to OpenVINO.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        import openvino as ov

        self.manifest = read_manifest(folder)
        self.family = family_module(self.manifest.family)
        self.config = _read_json(folder / "config.json")
        self.ends = end_tokens(folder)
        self._pad = _generation(folder).get("pad_token_id", self.ends[0])
        self._core = ov.Core()
        self.device = resolve_device(self._core, device)
        options = {"EXECUTION_MODE_HINT": "ACCURACY", **(ov_config or {})}
        if cache_dir is not None:
            options["CACHE_DIR"] = str(cache_dir)
        self._files: dict[str, Path] = {}
        self._compiled: dict[str, ov.CompiledModel] = {}
        for component in self.manifest.components:
            self._files[component.name] = next(
                folder / record.path for record in component.files if record.path.endswith(".xml")
            )
            try:
                self._compiled[component.name] = self._core.compile_model(
                    self._files[component.name], self.device, options
                )
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise BadInputError(
                    f"OpenVINO cannot compile {self._files[component.name]} for {device} ({reason}): "
                    "choose another --device or --ov-config"
                ) from error
        self._vision = self._compiled["vision_encoder"].create_infer_request()
        self._language = self._compiled["language_model"].create_infer_request()
        taken = {port.get_any_name() for port in self._compiled["language_model"].inputs}
        # What the vision encoder hands to the language model.
        self._shared = sorted(taken & {port.get_any_name() for port in self._compiled["vision_encoder"].outputs})
        self._small = sorted(taken - set(self._shared))
        self._inputs: dict[str, np.ndarray] = {}
        self._encoded = ""
        self.timings = Timings()

    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The vision encoder's outputs by name, for processor outputs with `pixel_values`."""
        self._encode(self.family.inputs(processed, self.config))
        names = [port.get_any_name() for port in self._compiled["vision_encoder"].outputs]
        return {name: _to_host(self._vision.get_tensor(name)) for name in names}

    @property
    def key_values(self) -> dict[str, np.ndarray]:
        """Copies of what the language model was given as the vision encoder's outputs in the last prefill."""
        return {name: _to_host(self._language.get_tensor(name)) for name in self._shared}

    def prefill(
        self,
        processed: dict[str, np.ndarray],
        key_values: dict[str, np.ndarray] | None = None,
        beams: int = 1,
    ) -> np.ndarray:
        """Start a sequence from processor outputs.

        The outputs of the vision encoder become inputs of the language model where they lie; images that equal those of
        the last call are not encoded again.

        Args:
            processed: as the checkpoint's processor gives them, as numpy arrays.
            key_values: vision encoder outputs to use instead of running it.
            beams: rows of `processed` that follow each other and share an image.

        Returns:
            Logits [batch, 1 or sequence, vocabulary], float32.
        """
        import openvino as ov

        self.timings = Timings()
        self._inputs = self.family.inputs(processed, self.config)
        if key_values is None and "pixel_values" in self._inputs:
            self._encode({name: value[::beams] for name, value in self._inputs.items()})
            if beams == 1:
                for name in self._shared:
                    self._language.set_tensor(name, self._vision.get_tensor(name))
            else:
                key_values = {
                    name: _to_host(self._vision.get_tensor(name)).repeat(beams, axis=0) for name in self._shared
                }
        elif key_values is None:
            key_values = self._inputs
        if key_values is not None:
            # Kept here because the tensors only borrow their memory.
            self._inputs |= {name: np.ascontiguousarray(key_values[name]) for name in self._shared}
            for name in self._shared:
                self._language.set_tensor(name, ov.Tensor(self._inputs[name], shared_memory=True))
        self._inputs["beam_idx"] = np.arange(self._inputs["input_ids"].shape[0], dtype=np.int32)
        self._language.reset_state()
        start = time.perf_counter()
        logits = self._infer()
        self.timings.first_token = time.perf_counter() - start
        return logits

    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """Append one token to every row.

        Args:
            tokens: [batch].
            beam_idx: [batch], the row that each row goes on from; its own by default.

        Returns:
            Logits [batch, 1, vocabulary], float32.
        """
        start = time.perf_counter()
        self._inputs = self.family.next_inputs(self._inputs, tokens)
        if beam_idx is not None:
            self._inputs["beam_idx"] = beam_idx.astype(np.int32)
        logits = self._infer()
        self.timings.other_tokens.append(time.perf_counter() - start)
        return logits

    def generate(self, processed: dict[str, np.ndarray], max_new_tokens: int) -> Iterator[np.ndarray]:
        """Greedy decoding: yields tokens [batch] until every row has ended; rows that ended get their padding token."""
        logits = self.prefill(processed)
        ended = np.zeros(logits.shape[0], bool)
        for position in range(max_new_tokens):
            tokens = logits[:, -1].argmax(axis=-1)
            tokens[ended] = self._pad
            yield tokens
            ended |= np.isin(tokens, self.ends)
            if ended.all() or position == max_new_tokens - 1:
                return
            logits = self.step(tokens)

    def _encode(self, values: dict[str, np.ndarray]) -> None:
        """Run the vision encoder, unless its last inputs were the same."""
        inputs = {name: np.ascontiguousarray(values[name]) for name in self._names("vision_encoder")}
        state = hashlib.blake2b()
        for name, value in inputs.items():
            state.update(f"{name}{value.shape}".encode())
            state.update(value.data)
        if state.hexdigest() == self._encoded:
            return
        start = time.perf_counter()
        self._encoded = ""
        if self.device.startswith("GPU"):
            self._place_on_device({name: value.shape for name, value in inputs.items()})
        self._vision.infer(inputs, share_inputs=True)
        self._encoded = state.hexdigest()
        self.timings.vision = time.perf_counter() - start

    def _place_on_device(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Let the vision encoder write its outputs into the GPU's memory, where the language model reads them."""
        context = self._core.get_default_context(self.device)
        model = self._core.read_model(self._files["vision_encoder"])
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        for name in self._shared:
            port = model.output(name)
            self._vision.set_tensor(name, context.create_tensor(port.element_type, port.shape, {}))

    def _names(self, component: str) -> list[str]:
        return [port.get_any_name() for port in self._compiled[component].inputs]

    def _infer(self) -> np.ndarray:
        results = self._language.infer({name: self._inputs[name] for name in self._small}, share_inputs=True)
        return np.array(results["logits"])


def end_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer; a generation config may name several, the model's config only one."""
    ends = _generation(folder).get("eos_token_id") or _read_json(folder / "config.json")["text_config"]["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return _read_json(path) if path.exists() else {}


def resolve_device(core: ov.Core, device: str) -> str:
    """The device that a name stands for: AUTO and AUTO:GPU,CPU are the first GPU of theirs, if there is one, else the first.

    Both graphs must lie on one device to share memory, which OpenVINO's own AUTO does not promise.
    """
    kind, _, listed = device.partition(":")
    if kind != "AUTO":
        return device
    available = list(core.available_devices)
    candidates = [name for name in listed.split(",") if name] or available
    matching = [name for wanted in candidates for name in available if name == wanted or name.split(".")[0] == wanted]
    if not matching:
        raise BadInputError(f"none of {device} is there: OpenVINO sees {', '.join(available)}")
    return next((name for name in matching if name.startswith("GPU")), matching[0])


def _to_host(tensor: ov.Tensor) -> np.ndarray:
    """A copy of a tensor in host memory, wherever it lies."""
    import openvino as ov

    if isinstance(tensor, ov.RemoteTensor):
        host = ov.Tensor(tensor.get_element_type(), tensor.get_shape())
        tensor.copy_to(host)
        return host.data
    return np.array(tensor.data)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
