"""The checkpoint as the side that an artifact is compared with: whole in memory where it fits, else block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmconvert.families import family_module

if TYPE_CHECKING:
    from passes.validate.protocol import Model
    from vlmconvert.pipeline import Conversion

__all__ = ["reference_model"]


def reference_model(conversion: Conversion, beside: int) -> Model:
    """The checkpoint in float32.

    Args:
        conversion: the opened checkpoint with its components.
        beside: bytes that the artifact takes in memory at the same time.

    Returns:
        transformers' own class if it fits into the free memory, else the same blocks that are exported, streamed.
    """
    import psutil

    family = family_module(conversion.family)
    checkpoint = conversion.checkpoint
    free = 0.8 * psutil.virtual_memory().available - beside
    if sum(4 * info.size for info in checkpoint.tensors.values()) <= free:
        model: Model = family.reference(checkpoint.folder)
        return model
    from passes.validate.streamed import StreamedModel

    # Half for the weights that stay, half for activations and whatever else runs.
    keep = max(0, int(free / 2))
    return StreamedModel(
        checkpoint,
        conversion.templates.names,
        conversion.config,
        conversion.components,
        family.inputs,
        family.next_inputs,
        keep,
    )
