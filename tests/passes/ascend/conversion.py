"""Ascend weights without the pipeline around them: what the pass and the format make of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.files import write_json
from passes.architecture import Architecture, read_architecture
from passes.ascend.format import DESCRIPTION_NAME, WEIGHTS_STEM, artifact_config, description
from passes.ascend.w8a16 import CompressW8A16Pass
from passes.checkpoint import Checkpoint, open_checkpoint
from passes.export.shards import Shards
from passes.tensor_pass import Tensors
from tests.checkpoints import ascend_family

__all__ = ["PER_CHANNEL", "Converted", "convert", "in_shards", "opened"]

PER_CHANNEL = CompressW8A16Pass()


@dataclass(frozen=True)
class Converted:
    """A folder that has been written.

    Attributes:
        checkpoint: what it was made from.
        architecture: the names of its tensors.
        shards: its tensors.
        description: the content of quant_model_description.json.
        config: the content of config.json.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    shards: Shards
    description: dict[str, Any]
    config: dict[str, Any]


def opened(folder: Path) -> tuple[Checkpoint, Architecture]:
    """A checkpoint's metadata, and what transformers says of it."""
    checkpoint = open_checkpoint(folder)
    return checkpoint, read_architecture(folder, list(checkpoint.tensors))


def in_shards(
    checkpoint: Checkpoint,
    architecture: Architecture,
    item: CompressW8A16Pass = PER_CHANNEL,
    shard_size: int = 10**9,
) -> Shards:
    """What the pass makes of a checkpoint, divided into files; nothing is written."""
    tensors = Tensors(checkpoint, architecture, "").followed_by(item)
    return Shards.packed(WEIGHTS_STEM, tensors.made(), shard_size)


def convert(source: Path, folder: Path, item: CompressW8A16Pass = PER_CHANNEL, shard_size: int = 60_000) -> Converted:
    """Write weights, description and config of a checkpoint into a new folder, in several files; there is no processor."""
    checkpoint, architecture = opened(source)
    shards = in_shards(checkpoint, architecture, item, shard_size)
    head = description(shards.tensors, item.group_size)
    config = artifact_config(checkpoint, architecture, ascend_family(source))
    folder.mkdir()
    shards.write(folder)
    write_json(folder / DESCRIPTION_NAME, head)
    write_json(folder / "config.json", config)
    return Converted(checkpoint, architecture, shards, head, config)
