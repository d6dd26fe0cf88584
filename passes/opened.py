"""An opened checkpoint, from which the first pass of a recipe starts."""

from __future__ import annotations

from dataclasses import dataclass

from passes.base import Intermediate
from passes.checkpoint import Checkpoint
from passes.export.template import Templates

__all__ = ["OpenedCheckpoint"]


@dataclass(frozen=True)
class OpenedCheckpoint(Intermediate):
    """A checkpoint whose metadata has been checked, and what transformers says about its config.

    Attributes:
        checkpoint: the checkpoint, which holds the tensors.
        templates: traced kinds of block, names of tensors and the architecture.
        key: digest of the tensors, the traces and the library versions, on which every result depends.
    """

    checkpoint: Checkpoint
    templates: Templates
    key: str
