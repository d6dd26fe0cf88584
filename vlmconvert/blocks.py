"""Where an artifact loses quality: its blocks beside those of the checkpoint, or of another artifact."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibration.inputs import write_inputs
from calibration.sources import SampleSet
from manifests.errors import BadInputError
from manifests.evaluation import BlockError
from manifests.io import MANIFEST_NAME, read_manifest
from manifests.model import Manifest
from passes.chain import BlockModels, CheckpointBlocks, FloatChain
from passes.checkpoint import open_checkpoint
from passes.export.template import Templates, prepare
from passes.store import Store
from passes.validate.blocks import ValidateBlocksPass
from vlmconvert.families import FAMILIES, family_module
from vlmconvert.targets import graph_file, target_module

__all__ = ["artifact_blocks", "block_errors"]


def block_errors(
    artifact: Path, reference: Path, samples: SampleSet, step: Callable[[str], None] = lambda label: None
) -> list[BlockError]:
    """Each block of an artifact beside the same block of a reference, on the reference's activations.

    Args:
        artifact: the folder of a finished artifact.
        reference: the folder of the checkpoint, whose blocks are computed in float32, or of another artifact of it.
        samples: what flows through the reference; through the artifact's own processor and chat template.
        step: called with a label after each block.

    Raises:
        BadInputError: if the two do not have the same blocks.
    """
    manifest = read_manifest(artifact)
    config = _config(artifact)
    module = FAMILIES[manifest.family]
    describe = family_module(manifest.family).components
    components = describe(config)
    with tempfile.TemporaryDirectory(prefix="vlmconvert-") as temporary:
        folders = [Path(temporary) / name for name in ("templates", "inputs", "store")]
        for folder in folders:
            folder.mkdir()
        templates, inputs, store = folders
        blocks: BlockModels
        if (reference / MANIFEST_NAME).is_file():
            blocks, other = artifact_blocks(reference, read_manifest(reference)), _config(reference)
        else:
            checkpoint = open_checkpoint(reference)
            prepare(reference, list(checkpoint.tensors), f"{module}:components", templates)
            blocks, other = CheckpointBlocks(checkpoint, Templates(templates)), Templates(templates).config
        if describe(other) != components:
            raise BadInputError(
                f"{artifact} and {reference} do not have the same blocks: compare conversions of one checkpoint"
            )
        write_inputs(artifact, samples, f"{module}:inputs", config, 0, inputs)
        chain = FloatChain(Store(store), blocks, components, config, "", inputs, samples.digest, len(samples.samples))
        return ValidateBlocksPass()(chain, artifact_blocks(artifact, manifest), step)


def artifact_blocks(folder: Path, manifest: Manifest) -> BlockModels:
    """The blocks of a finished artifact."""
    graphs = {record.name: folder / graph_file(record) for record in manifest.components}
    blocks: BlockModels = target_module(manifest.target).artifact_blocks(graphs)
    return blocks


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
