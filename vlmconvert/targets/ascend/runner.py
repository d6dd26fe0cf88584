"""Running an Ascend artifact without an NPU: torch computes its blocks one by one, with dequantized weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from passes.architecture import read_architecture
from passes.ascend.dequantize import open_w8a16
from passes.validate.streamed import StreamedModel, TorchBlocks
from vlmconvert.families import check_tied, complete_config
from vlmconvert.targets.runner import ArtifactRunner, Timings

if TYPE_CHECKING:
    from manifests.model import Manifest
    from vlmconvert.families.base import Family

__all__ = ["DequantizedRunner", "dequantized_blocks", "dequantized_model"]


def dequantized_model(folder: Path, family: Family, keep: int = 0) -> StreamedModel:
    """Open an artifact with the interface of the validation passes; see `dequantized_blocks`."""
    blocks = dequantized_blocks(folder, family, keep)
    config = blocks.config
    return StreamedModel(blocks, config, family.components(config), family.inputs, family.next_inputs)


def dequantized_blocks(folder: Path, family: Family, keep: int = 0) -> TorchBlocks:
    """Open the blocks of an artifact.

    Args:
        folder: the artifact.
        family: family of the artifact.
        keep: maximum number of bytes of dequantized weights that stay in memory between calls; with 0, every call reads
            all blocks.

    Raises:
        BadInputError: if the folder is not a W8A16 artifact, or a file is damaged.
    """
    artifact = open_w8a16(folder)
    architecture = read_architecture(folder, artifact.names)
    architecture.check(artifact)
    check_tied(family, architecture.config, architecture.names, artifact)
    # The config of an Ascend artifact lacks the small tensors that other targets write into it.
    config = complete_config(family, architecture.config, architecture.names, artifact)
    return TorchBlocks(artifact, architecture.names, config, keep)


class DequantizedRunner(ArtifactRunner):
    """Runs an Ascend artifact in float32, with the same interface as `vlmconvert.targets.runner.GraphRunner`.

    Weights stay in memory between calls up to half of the free memory; the other weights are read again for every
    token.

    Args:
        folder: the artifact.
        manifest: manifest of the artifact.
        family: family of the artifact.

    Raises:
        BadInputError: if a file is damaged.
    """

    device = "CPU"

    def __init__(self, folder: Path, manifest: Manifest, family: Family) -> None:
        import psutil

        super().__init__(folder, manifest, family)
        self._model = dequantized_model(folder, family, psutil.virtual_memory().available // 2)

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """See `passes.validate.model.Model`."""
        return self._model.handed

    def encode_images(self, processed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `vlmconvert.targets.runner.ArtifactRunner`."""
        return self._model.encode_images(processed)

    def prefill(
        self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None, beams: int = 1
    ) -> np.ndarray:
        """See `vlmconvert.targets.runner.GraphRunner.prefill`; a prompt is computed once for all of its beams."""
        self.timings = Timings()
        start = time.perf_counter()
        prompts = {name: value[::beams] for name, value in processed.items()}
        if handed is None:
            handed = self._model.encode_images(prompts)
            self.timings.vision = time.perf_counter() - start
        logits = self._model.prefill(prompts, handed)
        if beams > 1:
            self._model.repeat_rows(lambda values: self.family.repeat_rows(values, beams))
        self.timings.first_token = time.perf_counter() - start - self.timings.vision
        return logits.repeat(beams, axis=0)

    def step(self, tokens: np.ndarray, beam_idx: np.ndarray | None = None) -> np.ndarray:
        """See `vlmconvert.targets.runner.GraphRunner.step`."""
        start = time.perf_counter()
        logits = self._model.step(tokens, beam_idx)
        self.timings.other_tokens.append(time.perf_counter() - start)
        return logits
