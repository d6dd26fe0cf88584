"""Running a finished artifact: compiling its graphs, encoding images, prefill and decoding."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from passes.checkpoint import read_config
from passes.flow import run_components
from passes.vocabulary import Component, handed_over
from vlmconvert.families.base import read_generation_config
from vlmconvert.targets.runtime import Runtime, Value

if TYPE_CHECKING:
    from manifests.model import Manifest
    from vlmconvert.families.base import Family

__all__ = ["ArtifactRunner", "GraphRunner", "Timings"]


@dataclass
class Timings:
    """Times of the current sequence, in seconds; `vision` is 0 if the images had been encoded before."""

    vision: float = 0.0
    first_token: float = 0.0
    other_tokens: list[float] = field(default_factory=list)


class ArtifactRunner(ABC):
    """Base class of the runners of artifacts.

    Args:
        folder: the artifact.
        manifest: manifest of the artifact.
        family: family of the artifact.

    Attributes:
        device: device of the runtime.
        images_once: whether no further images are expected after the first ones, so that a runner may free what has
            encoded them before the language model takes its memory.
    """

    device: str
    images_once = False

    def __init__(self, folder: Path, manifest: Manifest, family: Family) -> None:
        self.manifest, self.family = manifest, family
        self.config = read_config(folder)
        self.ends = family.end_tokens(folder)
        pad = read_generation_config(folder).get("pad_token_id")
        self._pad = self.ends[0] if pad is None else pad
        self.timings = Timings()

    @property
    @abstractmethod
    def handed(self) -> dict[str, np.ndarray]:
        """Copies of the tensors that the vision side handed to the language side in the last prefill, by name."""

    @abstractmethod
    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the vision side on the processor's outputs for images; returns its outputs by name."""

    @abstractmethod
    def prefill(
        self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None, beams: int = 1
    ) -> np.ndarray:
        """Start new sequences from the processor's outputs for prompts.

        Args:
            processed: outputs of the checkpoint's processor, as numpy arrays.
            handed: tensors that the vision side hands to the language side; None runs the vision side.
            beams: number of consecutive rows of `processed` that are the same prompt.

        Returns:
            Logits [batch, 1 or sequence, vocabulary], float32.
        """

    @abstractmethod
    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """Append one token to every sequence.

        Args:
            tokens: [batch].
            beam_idx: [batch], the number of the sequence that each sequence continues; None continues each sequence
                itself.

        Returns:
            Logits [batch, 1, vocabulary], float32.
        """

    def generate(self, processed: dict[str, np.ndarray], max_new_tokens: int) -> Iterator[np.ndarray]:
        """Decode greedily, and yield tokens [batch] until all sequences have ended; ended ones get padding tokens."""
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


class GraphRunner(ArtifactRunner):
    """Runs an artifact whose components are graphs.

    Args:
        folder: the artifact.
        manifest: manifest of the artifact.
        family: family of the artifact.
        graphs: name of a component -> file of its graph.
        runtime: runtime that computes the graphs.

    Raises:
        BadInputError: if the runtime cannot open a graph.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, family: Family, graphs: Mapping[str, Path], runtime: Runtime
    ) -> None:
        super().__init__(folder, manifest, family)
        self._runtime = runtime
        self.device = runtime.device
        self.components: tuple[Component, ...] = family.components(self.config)
        self._handed: dict[str, Value] = {}
        # Outputs of a graph that are inputs of another graph, without a host step; they can stay on the device.
        self.shared = frozenset(
            name
            for component in self.components
            for name in component.reads
            if component.host_step is None or name not in component.host_step.outputs
        )
        self._files = graphs
        self.graphs = {name: runtime.open(file, self.shared) for name, file in graphs.items()}
        if "logits" not in self.graphs[self.components[-1].name].outputs:
            raise ValueError(f"{graphs[self.components[-1].name].name} gives no logits")
        self._values: dict[str, Value] = {}
        self._encoded: dict[str, tuple[str, dict[str, Value]]] = {}

    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `ArtifactRunner`."""
        values = self.family.inputs(processed, self.config)
        vision = tuple(component for component in self.components if component.side == "vision")
        known = run_components(vision, values, self._prepare, self._run)
        made = {port.name for component in vision for port in component.outputs}
        return {name: self._runtime.to_host(value) for name, value in known.items() if name in made}

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """See `ArtifactRunner`."""
        return {name: self._runtime.to_host(value) for name, value in self._handed.items()}

    def prefill(
        self,
        processed: dict[str, np.ndarray],
        handed: dict[str, np.ndarray] | None = None,
        beams: int = 1,
    ) -> np.ndarray:
        """See `ArtifactRunner`.

        Outputs of one graph become inputs of the next without a copy. Images that are equal to those of the previous
        call are not encoded again.
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
                inputs = {name: self._runtime.to_host(value) for name, value in inputs.items()}
                inputs = dict(self.family.repeat_rows(inputs, beams))
            rows = np.arange(len(inputs["attention_mask"]), dtype=np.int32)
            inputs["beam_idx"] = rows if beam_idx is None else beam_idx.astype(np.int32)
            return inputs | self.graphs[component.name](inputs)

        self._values = run_components(self.components, values, self._prepare, compute)
        return self._runtime.to_host(self._values["logits"])

    def _prepare(self, component: Component, values: Mapping[str, Value]) -> dict[str, np.ndarray]:
        step = component.host_step
        assert step is not None
        return step({name: self._runtime.to_host(values[name]) for name in step.inputs if name in values}, self.config)

    def _run(self, component: Component, inputs: dict[str, Value]) -> dict[str, Value]:
        """Run a component other than the language model; a vision encoder runs only if its inputs have changed."""
        if component.side != "vision":
            return self.graphs[component.name](inputs)
        start = time.perf_counter()
        state = hashlib.blake2b()
        for name, value in inputs.items():
            array = np.ascontiguousarray(self._runtime.to_host(value))
            state.update(f"{name}{array.shape}".encode())
            state.update(array.data)
        digest, outputs = self._encoded.get(component.name, ("", {}))
        if digest == state.hexdigest():
            return outputs
        self._encoded.pop(component.name, None)
        if component.name not in self.graphs:
            self.graphs[component.name] = self._runtime.open(self._files[component.name], self.shared)
        outputs = self.graphs[component.name](inputs)
        if self.images_once:
            outputs = {name: self._runtime.to_host(value) for name, value in outputs.items()}
            del self.graphs[component.name]
        self._encoded[component.name] = (state.hexdigest(), outputs)
        self.timings.vision += time.perf_counter() - start
        return outputs
