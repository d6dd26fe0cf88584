"""*split*: every tensor of a checkpoint is assigned to the blocks that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manifests.errors import BadInputError
from passes.base import Context, Form, Intermediate, TransformPass
from passes.block_pass import SplitBlocks
from passes.checkpoint import Checkpoint
from passes.opened import OpenedCheckpoint
from passes.vocabulary import Component, TensorShapes

__all__ = ["SplitPass", "check_tensors"]


@dataclass(frozen=True)
class SplitPass(TransformPass):
    """Divide a component into blocks, each with the tensors that it reads; `check_tensors` has checked that they exist."""

    name = "split"
    takes = (Form.CHECKPOINT,)

    @property
    def makes(self) -> Form:
        return Form.SPLIT

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, OpenedCheckpoint)
        return SplitBlocks(context.component, before.checkpoint, before.templates, before.key)


def check_tensors(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    components: tuple[Component, ...],
    shapes: Mapping[str, TensorShapes],
) -> tuple[str, ...]:
    """Check by metadata that a checkpoint holds all tensors that components read, in the right shapes.

    Args:
        checkpoint: the opened checkpoint.
        names: in-memory tensor name -> name in the files.
        components: components whose blocks are bound to tensors.
        shapes: kind -> parameter -> shape that the config implies.

    Returns:
        The in-memory names of tensors that no block reads.

    Raises:
        BadInputError: on the first missing or misshapen tensor.
    """
    for component in components:
        for block in component.blocks:
            for parameter, name in block.tensors.items():
                expected = shapes[block.kind][parameter]
                if name not in names:
                    raise BadInputError(
                        f"{checkpoint.folder} lacks tensor {name} (shape {list(expected)}), which block {block.name} of "
                        f"the {component.name} needs: fetch the checkpoint again or correct its config.json"
                    )
                info = checkpoint.weight(names[name])
                if info.shape != expected:
                    raise BadInputError(
                        f"{checkpoint.folder / info.file}: tensor {names[name]} has shape {list(info.shape)}, expected "
                        f"{list(expected)} from config.json: give the config that belongs to these weights"
                    )
    used = set().union(*(component.tensor_names() for component in components))
    return tuple(sorted(names.keys() - used))
