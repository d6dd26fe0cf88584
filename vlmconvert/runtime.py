"""Running the graphs of a finished artifact: compile, encode images, prefill, decode."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import BadInputError
from manifests.io import read_manifest
from passes.flow import run_components
from passes.split import Component, handed_over
from vlmconvert.engines import Engine, Value
from vlmconvert.families import family_module
from vlmconvert.targets import graph_file, target_module

__all__ = ["ArtifactRunner", "Runner", "Timings", "end_tokens", "open_runner"]


@dataclass
class Timings:
    """Seconds since the last prefill began; `vision` is 0 if the images had been encoded already."""

    vision: float = 0.0
    first_token: float = 0.0
    other_tokens: list[float] = field(default_factory=list)


class ArtifactRunner(ABC):
    """What every way to run an artifact shares.

    Args:
        folder: the artifact; its manifest says what it holds.

    Raises:
        BadInputError: if the folder is no artifact.
    """

    device: str

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.family = family_module(self.manifest.family)
        self.config = _read_json(folder / "config.json")
        self.ends = end_tokens(folder)
        pad = _generation(folder).get("pad_token_id")
        self._pad = self.ends[0] if pad is None else pad
        self.timings = Timings()

    @property
    @abstractmethod
    def handed(self) -> dict[str, np.ndarray]:
        """Copies of what the vision side handed to the language side in the last prefill."""

    @abstractmethod
    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the vision side makes of processor outputs with images, by name."""

    @abstractmethod
    def prefill(
        self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None, beams: int = 1
    ) -> np.ndarray:
        """Start a sequence from processor outputs.

        Args:
            processed: as the checkpoint's processor gives them, as numpy arrays.
            handed: what the vision side hands to the language side, instead of running it.
            beams: rows of `processed` that follow each other and are one prompt.

        Returns:
            Logits [batch, 1 or sequence, vocabulary], float32.
        """

    @abstractmethod
    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """Append one token to every row.

        Args:
            tokens: [batch].
            beam_idx: [batch], the row that each row goes on from; its own by default.

        Returns:
            Logits [batch, 1, vocabulary], float32.
        """

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


class Runner(ArtifactRunner):
    """An artifact in the runtime of its target.

    Args:
        folder: the artifact; its manifest says what it holds.
        device: a device name of that runtime.
        ov_config: options of that runtime.
        cache_dir: where OpenVINO keeps compiled models.

    Raises:
        BadInputError: if the folder is no artifact, or the device or an option is unknown to the runtime.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(folder)
        self._engine: Engine = target_module(self.manifest.target).open_engine(device, ov_config, cache_dir)
        self.device = self._engine.device
        self.components: tuple[Component, ...] = self.family.components(self.config)
        self._handed: dict[str, Value] = {}
        # What one graph hands to another where it lies.
        self.shared = frozenset(
            name
            for component in self.components
            for name in component.reads
            if component.host_step is None or name not in component.host_step.outputs
        )
        self.graphs = {
            record.name: self._engine.open(folder / graph_file(record), self.shared)
            for record in self.manifest.components
        }
        self._values: dict[str, Value] = {}
        self._encoded: dict[str, tuple[str, dict[str, Value]]] = {}

    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `ArtifactRunner`."""
        values = self.family.inputs(processed, self.config)
        vision = tuple(component for component in self.components if component.side == "vision")
        known = run_components(vision, values, self._prepare, self._run)
        made = {port.name for component in vision for port in component.outputs}
        return {name: self._engine.to_host(value) for name, value in known.items() if name in made}

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """See `ArtifactRunner`."""
        return {name: self._engine.to_host(value) for name, value in self._handed.items()}

    def prefill(
        self,
        processed: dict[str, np.ndarray],
        handed: dict[str, np.ndarray] | None = None,
        beams: int = 1,
    ) -> np.ndarray:
        """See `ArtifactRunner`.

        Outputs of one graph become inputs of the next where they lie; images that equal those of the last call are not
        encoded again.
        """
        self.timings = Timings()
        values = self.family.inputs({name: value[::beams] for name, value in processed.items()}, self.config)
        self.graphs[self.components[-1].name].reset()
        start = time.perf_counter()
        logits = self._logits(values | (handed or {}), beams)
        self._handed = {name: self._values[name] for name in handed_over(self.components) if name in self._values}
        self.timings.first_token = time.perf_counter() - start - self.timings.vision
        return logits

    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """See `ArtifactRunner`."""
        start = time.perf_counter()
        logits = self._logits(self.family.next_inputs(self._values, tokens), beam_idx=beam_idx)
        self.timings.other_tokens.append(time.perf_counter() - start)
        return logits

    def _logits(self, values: Mapping[str, Value], beams: int = 1, beam_idx: np.ndarray | None = None) -> np.ndarray:
        def compute(component: Component, inputs: dict[str, Value]) -> dict[str, Value]:
            if component is not self.components[-1]:
                return self._run(component, inputs)
            if beams > 1:
                inputs = {name: self._engine.to_host(value).repeat(beams, axis=0) for name, value in inputs.items()}
            rows = np.arange(len(inputs["attention_mask"]), dtype=np.int32)
            inputs["beam_idx"] = rows if beam_idx is None else beam_idx.astype(np.int32)
            return inputs | self.graphs[component.name](inputs)

        self._values = run_components(self.components, values, self._prepare, compute)
        return self._engine.to_host(self._values["logits"])

    def _prepare(self, component: Component, values: Mapping[str, Value]) -> dict[str, np.ndarray]:
        step = component.host_step
        assert step is not None
        return step({name: self._engine.to_host(values[name]) for name in step.inputs if name in values}, self.config)

    def _run(self, component: Component, inputs: dict[str, Value]) -> dict[str, Value]:
        """Run a component before the language model; a vision encoder only if its last inputs were others."""
        if component.side != "vision":
            return self.graphs[component.name](inputs)
        start = time.perf_counter()
        state = hashlib.blake2b()
        for name, value in inputs.items():
            array = np.ascontiguousarray(self._engine.to_host(value))
            state.update(f"{name}{array.shape}".encode())
            state.update(array.data)
        digest, outputs = self._encoded.get(component.name, ("", {}))
        if digest == state.hexdigest():
            return outputs
        self._encoded.pop(component.name, None)
        outputs = self.graphs[component.name](inputs)
        self._encoded[component.name] = (state.hexdigest(), outputs)
        self.timings.vision += time.perf_counter() - start
        return outputs


def open_runner(
    folder: Path,
    device: str = "CPU",
    ov_config: Mapping[str, Any] | None = None,
    cache_dir: Path | None = None,
) -> ArtifactRunner:
    """An artifact of any target, ready to run; see `Runner`. One for Ascend is computed in torch, without an NPU.

    Raises:
        BadInputError: if the folder is no artifact, or the options are not those of its runtime.
    """
    if read_manifest(folder).target != "ascend":
        return Runner(folder, device, ov_config, cache_dir)
    if device.upper() != "CPU" or ov_config or cache_dir is not None:
        raise BadInputError(
            f"{folder} is for Ascend and is computed in torch here: leave out --device, --ov-config and --cache-dir"
        )
    from vlmconvert.dequantized import DequantizedRunner

    return DequantizedRunner(folder)


def end_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer; a generation config may name several, the model's config only one."""
    ends = _generation(folder).get("eos_token_id") or _read_json(folder / "config.json")["text_config"]["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
