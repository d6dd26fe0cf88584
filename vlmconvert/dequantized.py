"""Running an Ascend artifact without an NPU: its blocks in torch, one at a time, with dequantized weights."""

from __future__ import annotations

from pathlib import Path

from passes.architecture import read_architecture
from passes.quantized import open_w8a16
from passes.validate.streamed import StreamedModel
from vlmconvert.families import family_module

__all__ = ["dequantized_model"]


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
    family = family_module(str(artifact.config["model_type"]).replace("_", "-"))
    # Entries of the config that other formats have no tensor for.
    tensors = {key: artifact.read(architecture.names[name]).tolist() for key, name in family.CONFIG_TENSORS.items()}
    config = architecture.config | tensors
    return StreamedModel(
        artifact, architecture.names, config, family.components(config), family.inputs, family.next_inputs, keep
    )
