"""The checkpoint as the side that an artifact is compared with: whole in memory where it fits, else block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vlmconvert.families import family_module

if TYPE_CHECKING:
    from passes.checkpoint import Checkpoint
    from passes.split import Component
    from passes.validate.protocol import Model

__all__ = ["Opened", "reference_model"]


class Opened(Protocol):
    """An opened checkpoint.

    Attributes:
        family: its name.
        checkpoint: the tensors.
        config: the completed config.
        components: what it splits into.
    """

    family: str
    checkpoint: Checkpoint
    config: dict[str, Any]
    components: tuple[Component, ...]

    @property
    def names(self) -> dict[str, str]:
        """In-memory tensor name -> name in the checkpoint's files."""
        ...


def reference_model(opened: Opened, beside: int) -> Model:
    """The checkpoint in float32.

    Args:
        opened: the checkpoint with its components.
        beside: bytes that the artifact takes in memory at the same time.

    Returns:
        transformers' own class if it fits into the free memory, else the same blocks that are exported, streamed.
    """
    import psutil

    family = family_module(opened.family)
    checkpoint = opened.checkpoint
    free = 0.8 * psutil.virtual_memory().available - beside
    if sum(4 * info.size for info in checkpoint.tensors.values()) <= free:
        model: Model = family.reference(checkpoint.folder)
        return model
    from passes.validate.streamed import StreamedModel

    # Half for the weights that stay, half for activations and whatever else runs.
    keep = max(0, int(free / 2))
    return StreamedModel(
        checkpoint,
        opened.names,
        opened.config,
        opened.components,
        family.inputs,
        family.next_inputs,
        keep,
    )
