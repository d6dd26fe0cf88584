"""Where an artifact loses quality: its blocks are compared with those of the checkpoint, or of another artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from calibration.inputs import write_inputs
from calibration.sources import SampleSet
from manifests.errors import BadInputError
from manifests.evaluation import BlockError
from manifests.io import MANIFEST_NAME, read_manifest
from manifests.leftovers import scratch_folder
from manifests.model import Manifest
from passes.chain import BlockModels, CheckpointBlocks, FloatChain
from passes.checkpoint import open_checkpoint, read_config
from passes.export.template import Templates, prepare, trace
from passes.store import Store
from passes.validate.blocks import ValidateBlocksPass
from vlmconvert.families import load_family
from vlmconvert.targets import load_target

__all__ = ["artifact_blocks", "block_errors"]


def block_errors(
    artifact: Path, reference: Path, samples: SampleSet, step: Callable[[str], None] = lambda label: None
) -> list[BlockError]:
    """Compare each block of an artifact with the same block of a reference, on the reference's activations.

    Args:
        artifact: folder of the artifact.
        reference: folder of the checkpoint, whose blocks are computed in float32, or of another artifact made from it.
        samples: samples that run through the reference, processed by the artifact's processor and chat template.
        step: called with a label after each block.

    Returns:
        The error of each block, in the order of the data flow.

    Raises:
        BadInputError: if the two do not have the same blocks, or an artifact cannot be cut into blocks.
    """
    manifest = read_manifest(artifact)
    family = load_family(manifest.family)
    config = load_target(manifest.target).config(artifact, family)
    components = family.components(config)
    with scratch_folder() as temporary:
        folders = [Path(temporary) / name for name in ("prepared", "templates", "inputs", "store")]
        for folder in folders:
            folder.mkdir()
        prepared, templates, inputs, store = folders
        blocks: BlockModels
        if (reference / MANIFEST_NAME).is_file():
            blocks, other = _blocks(reference, read_manifest(reference)), read_config(reference)
        else:
            checkpoint = open_checkpoint(reference)
            prepare(reference, list(checkpoint.tensors), family.components, prepared)
            trace(prepared, family.components, templates)
            blocks, other = CheckpointBlocks(checkpoint, Templates(templates)), Templates(templates).config
        if family.components(other) != components:
            raise BadInputError(
                f"{artifact} and {reference} do not have the same blocks: compare conversions of one checkpoint"
            )
        if isinstance(blocks, CheckpointBlocks):
            components = tuple(component.bound(blocks.templates.shapes) for component in components)
        write_inputs(artifact, samples, family, config, 0, inputs)
        counts = dict.fromkeys((component.name for component in components), len(samples.samples))
        chain = FloatChain(Store(store), blocks, components, config, "", inputs, lambda _: samples.digest, counts)
        return ValidateBlocksPass()(chain, _blocks(artifact, manifest), step)


def artifact_blocks(folder: Path, manifest: Manifest) -> BlockModels | None:
    """The blocks of a finished artifact; None if its target cannot cut it into blocks."""
    return load_target(manifest.target).blocks(folder, manifest, load_family(manifest.family))


def _blocks(folder: Path, manifest: Manifest) -> BlockModels:
    blocks = artifact_blocks(folder, manifest)
    if blocks is None:
        raise BadInputError(f"{folder} cannot be cut into blocks: compare artifacts of another target")
    return blocks
