"""Running an Ascend artifact without an NPU: its blocks in torch, one at a time, with dequantized weights."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from passes.architecture import read_architecture
from passes.quantized import open_w8a16
from passes.validate.streamed import StreamedModel
from vlmconvert.families import complete_config, family_module
from vlmconvert.runtime import ArtifactRunner, Timings

__all__ = ["DequantizedRunner", "dequantized_model"]


def dequantized_model(folder: Path, keep: int = 0) -> StreamedModel:
    """An artifact with the interface of the validation passes.

    Args:
        folder: the artifact.
        keep: bytes of dequantized weights that may stay in memory between calls; without any, each call reads every block.

    Raises:
        BadInputError: if the folder is no W8A16 artifact, or a file is damaged.
    """
    artifact = open_w8a16(folder)
    architecture = read_architecture(folder, artifact.names)
    architecture.check(artifact)
    name = str(artifact.config["model_type"]).replace("_", "-")
    family = family_module(name)
    # Entries of the config that other formats have no tensor for.
    config = complete_config(name, architecture.config, architecture.names, artifact)
    return StreamedModel(
        artifact, architecture.names, config, family.components(config), family.inputs, family.next_inputs, keep
    )


class DequantizedRunner(ArtifactRunner):
    """An Ascend artifact with the interface of `vlmconvert.runtime.Runner`, computed in float32.

    Half of the free memory may hold weights between calls; what does not fit is read again for every token.

    Args:
        folder: the artifact.

    Raises:
        BadInputError: if the folder is no artifact, or a file is damaged.
    """

    device = "CPU"

    def __init__(self, folder: Path) -> None:
        import psutil

        super().__init__(folder)
        self._model = dequantized_model(folder, psutil.virtual_memory().available // 2)

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """See `passes.validate.protocol.Model`."""
        return self._model.handed

    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the vision side makes of processor outputs with images, by name."""
        return self._model.encode_images(processed)

    def prefill(
        self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None, beams: int = 1
    ) -> np.ndarray:
        """See `vlmconvert.runtime.Runner.prefill`; a prompt is computed once for all of its beams."""
        self.timings = Timings()
        start = time.perf_counter()
        prompts = {name: value[::beams] for name, value in processed.items()}
        if handed is None:
            handed = self._model.encode_images(prompts)
            self.timings.vision = time.perf_counter() - start
        logits = self._model.prefill(prompts, handed)
        if beams > 1:
            self._model.repeat_rows(beams)
        self.timings.first_token = time.perf_counter() - start - self.timings.vision
        return logits.repeat(beams, axis=0)

    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """See `vlmconvert.runtime.Runner.step`."""
        start = time.perf_counter()
        logits = self._model.step(tokens, beam_idx)
        self.timings.other_tokens.append(time.perf_counter() - start)
        return logits
