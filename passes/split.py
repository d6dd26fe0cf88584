"""Splitting a checkpoint: components, their blocks, and the tensors that each block reads.

A family describes its model with these words; the passes work on them and never learn the family's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from manifests.errors import BadInputError
from manifests.model import Port
from passes.base import Pass
from passes.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Block", "Component", "HostStep", "Kind", "SplitPass", "handed_over"]

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
class HostStep:
    """What a runtime does between two graphs, such as placing image features among text embeddings.

    Attributes:
        function: `package.module:function`; called with (values, config), the values being those of `inputs` that there
            are, it returns those of `outputs` that it can make.
        inputs: names of values.
        outputs: names of values; one that is there already may be made anew.
    """

    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, values: Mapping[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """Run the step on named values, which may be more than it reads."""
        module, _, attribute = self.function.partition(":")
        function: Callable[..., dict[str, np.ndarray]] = getattr(importlib.import_module(module), attribute)
        return function({name: values[name] for name in self.inputs if name in values}, config)


@dataclass(frozen=True)
class Component:
    """One graph that is shipped.

    Components feed each other by the names of their values: an input comes from the host step, from an earlier
    component's outputs, or from the processor's. One whose inputs are not all there has nothing to do, such as a vision
    encoder in a prompt without an image.

    Attributes:
        name: as in the manifest, such as `language_model`.
        side: whether it belongs to the language model or to the vision encoder; each side has its own precision.
        role: what a runtime uses it for.
        stems: target -> name of the files without ending.
        blocks: in the order of the data flow.
        inputs, outputs: ports of the shipped graph, in order, named as the values inside the component.
        state: value fed to a block -> value that replaces it after a call, such as past_key_values.0.key -> present.0.key.
        logits: whether the component has an LM head.
        host_step: runs before the component.
        aliases: output -> the name that OpenVINO's runtimes look for, where it is another.
        calibrated: whether calibration samples, which are prompts with one image, reach it.
    """

    name: str
    side: Literal["vision", "language"]
    role: str
    stems: dict[str, str]
    kinds: dict[str, Kind]
    blocks: tuple[Block, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    state: dict[str, str] = field(default_factory=dict)
    logits: bool = False
    host_step: HostStep | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    calibrated: bool = True

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that come from outside, the state's included."""
        made: set[str] = set()
        found: dict[str, None] = {}
        for block in self.blocks:
            found |= dict.fromkeys(value for value in block.inputs.values() if value not in made)
            made.update(block.outputs.values())
        return tuple(found)

    def tensor_names(self) -> set[str]:
        """All tensors that the component reads, in-memory spelling."""
        return {name for block in self.blocks for name in block.tensors.values()}


def handed_over(components: tuple[Component, ...]) -> tuple[str, ...]:
    """Names of what the vision side hands to the last component, which has the LM head, or to its host step."""
    last = components[-1]
    taken = {*last.reads, *(last.host_step.inputs if last.host_step else ())}
    outputs = [port.name for part in components if part.side == "vision" for port in part.outputs]
    return tuple(name for name in outputs if name in taken)


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
