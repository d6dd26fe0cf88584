"""The checkpoint as the reference for an artifact: whole in memory if it fits, otherwise block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmconvert.conversion.machine import free_memory

if TYPE_CHECKING:
    from passes.validate.model import Model
    from vlmconvert.families.opened import OpenedModel

__all__ = ["fits_whole", "reference_model"]

# Bytes of a process that has torch and a runtime in memory.
_PROCESS = 800_000_000


def fits_whole(opened: OpenedModel, beside: int, limit: int | None = None) -> bool:
    """Whether the checkpoint in float32 fits into the memory.

    Args:
        opened: the checkpoint.
        beside: bytes of memory that the artifact needs at the same time.
        limit: limit for the memory in bytes; None takes what is free.
    """
    return sum(4 * info.size for info in opened.checkpoint.weights.values()) <= _free(beside, limit)


def _free(beside: int, limit: int | None = None) -> float:
    free = free_memory()
    return 0.8 * (free if limit is None else min(free, limit - _PROCESS)) - beside


def reference_model(opened: OpenedModel, beside: int) -> Model:
    """Open the checkpoint in float32.

    Args:
        opened: the checkpoint, with a completed config.
        beside: bytes of memory that the artifact needs at the same time.

    Returns:
        A model of transformers' own class, if it fits into the free memory; otherwise a model that computes the same
        blocks that are exported, one at a time.
    """
    family, checkpoint = opened.family, opened.checkpoint
    if fits_whole(opened, beside):
        return family.reference(checkpoint.folder)
    from passes.validate.streamed import StreamedModel, TorchBlocks

    # Half of the free memory is for weights that stay in memory, the other half for activations and everything else.
    keep = max(0, int(_free(beside) / 2))
    blocks = TorchBlocks(checkpoint, opened.names, opened.config, keep)
    return StreamedModel(blocks, opened.config, opened.components, family.inputs, family.next_inputs)
