"""`OpenedModel`: everything about a checkpoint that can be known without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlmconvert.families import check_tied, complete_config

if TYPE_CHECKING:
    from passes.checkpoint import Checkpoint
    from passes.export.template import Templates
    from passes.vocabulary import Component
    from vlmconvert.families.base import Family

__all__ = ["OpenedModel"]


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint whose metadata has been read and checked; no weight has been read.

    Attributes:
        family: family of the model.
        checkpoint: the checkpoint's files and the metadata of its tensors.
        templates: traced blocks, tensor names, and transformers' description of the architecture.
        config: the config with all defaults filled in.
        components: components of the model, bound to the checkpoint's tensors if its blocks have been traced.
        unused: in-memory names of the tensors that no component reads.
    """

    family: Family
    checkpoint: Checkpoint
    templates: Templates
    config: dict[str, Any]
    components: tuple[Component, ...]
    unused: tuple[str, ...]

    @property
    def names(self) -> dict[str, str]:
        """In-memory tensor name -> name in the checkpoint's files."""
        return self.templates.names

    def completed(self) -> OpenedModel:
        """The same model with a completed config, which has the small tensors that runtimes read from it.

        These tensors are read from the checkpoint. Tied tensors are read too, and compared.

        Raises:
            BadInputError: if the checkpoint lacks a tensor, or tied tensors have different values.
        """
        check_tied(self.family, self.config, self.names, self.checkpoint)
        return replace(self, config=complete_config(self.family, self.config, self.names, self.checkpoint))
