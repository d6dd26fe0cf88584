"""Splitting a checkpoint: components, their blocks, and the tensors that each block reads.

A family describes its model with these words; the passes work on them and never learn the family's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from manifests.errors import BadInputError
from manifests.model import Port
from passes.base import Pass
from passes.checkpoint import Checkpoint

__all__ = ["Block", "Component", "Kind", "SplitPass"]

TensorShapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of block: blocks of one kind differ only in their weights, so one trace serves them all.

    Attributes:
        name: unique in the family.
        module: `package.module:function`; called with the config it returns a `torch.nn.Module` on the meta device
            whose parameters are the block's weights and whose `forward` takes `inputs` by name.
        inputs: ports in the order of `forward`; named dims are dynamic.
        outputs: ports in the order in which `forward` returns them.
        dims: a size for every named dim, used as the example when the block is traced.
        options: further JSON-able arguments of `module`.
    """

    name: str
    module: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dims: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """The unit of streaming.

    Attributes:
        name: unique in the component, such as `layers.3`.
        kind: name of its kind.
        tensors: parameter of the kind's module -> name of the tensor, in transformers' in-memory spelling.
        inputs: port of the kind -> name of the value in the component that feeds it.
        outputs: port of the kind -> name of the value that it makes; a later block may make it anew.
        role: `layer` for the blocks whose linear layers are the model's body, `embeddings`, `head`, or `glue` for
            blocks without weights worth compressing.
    """

    name: str
    kind: str
    tensors: dict[str, str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    role: str = "layer"


@dataclass(frozen=True)
class Component:
    """One graph that is shipped.

    Attributes:
        name: as in the manifest, such as `language_model`.
        role: what a runtime uses it for.
        file_stem: name of the files without ending.
        blocks: in the order of the data flow.
        inputs, outputs: ports of the shipped graph, in order, named as the values inside the component.
        state: value fed to a block -> value that replaces it after a call, such as past_key_values.0.key -> present.0.key.
        logits: whether the component has an LM head.
    """

    name: str
    role: str
    file_stem: str
    kinds: dict[str, Kind]
    blocks: tuple[Block, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    state: dict[str, str] = field(default_factory=dict)
    logits: bool = False

    def tensor_names(self) -> set[str]:
        """All tensors that the component reads, in-memory spelling."""
        return {name for block in self.blocks for name in block.tensors.values()}


@dataclass(frozen=True)
class SplitPass(Pass):
    """Assign every tensor of a checkpoint to the blocks that read it, checking names, shapes and dtypes."""

    name = "split"

    def __call__(
        self,
        checkpoint: Checkpoint,
        names: dict[str, str],
        components: tuple[Component, ...],
        shapes: dict[str, TensorShapes],
    ) -> list[str]:
        """Check the checkpoint against the components.

        Args:
            checkpoint: the opened checkpoint.
            names: in-memory tensor name -> name in the files.
            components: what the family makes of the config.
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
                            f"the {component.name} needs: fetch the checkpoint again or mend its config.json"
                        )
                    info = checkpoint.tensors[names[name]]
                    if info.shape != expected:
                        raise BadInputError(
                            f"{checkpoint.folder / info.file}: tensor {names[name]} has shape {list(info.shape)}, expected "
                            f"{list(expected)} from config.json: give the config that belongs to these weights"
                        )
        used = set().union(*(component.tensor_names() for component in components))
        return sorted(names.keys() - used)
