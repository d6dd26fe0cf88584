"""The vocabulary in which a family describes its model to the passes: kinds, blocks, components and host steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from manifests.errors import ConversionError
from passes.registry import load_object

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from manifests.model import Port

__all__ = [
    "Block",
    "Component",
    "HostStep",
    "Kind",
    "TensorShapes",
    "handed_over",
    "kinds_by_name",
    "kinds_of",
    "operation_name",
]

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
        options: further arguments of `module`, which JSON can hold.
    """

    name: str
    module: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dims: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)

    def make_module(self, config: dict[str, Any]) -> nn.Module:
        """Make the torch module that computes a block, in eval mode, with its parameters on the meta device."""
        module: nn.Module = load_object(self.module)(config, **self.options)
        return module.eval()


@dataclass(frozen=True)
class Block:
    """The unit of streaming: blocks are converted one at a time, so that memory holds the weights of one block only.

    A family says in `weights` where the block's weights are in the checkpoint. `bound` fills `tensors` when the kind's module
    has been made and its parameters are known.

    Attributes:
        name: unique in the component, such as `layers.3`.
        kind: name of its kind.
        weights: path inside the kind's module -> prefix that replaces it in the names of the checkpoint's tensors (in-memory
            names, as in transformers). "" is the whole module, `layer` a submodule, `lm_head.weight` a single parameter. If
            two paths contain a parameter, the longer one counts.
        inputs: port of the kind -> name of the value in the component that feeds it.
        outputs: port of the kind -> name of the value that it makes; a later block may replace a value of that name.
        role: `layer` for the blocks whose linear layers are the model's body, `embeddings`, `head`, or `glue` for
            blocks without weights worth compressing.
        tensors: parameter of the kind's module -> in-memory name of its tensor; empty until the block is bound.
    """

    name: str
    kind: str
    weights: dict[str, str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    role: str = "layer"
    tensors: dict[str, str] = field(default_factory=dict)

    def bound(self, parameters: Iterable[str]) -> Block:
        """The block with `tensors` filled for every parameter.

        Args:
            parameters: names of all parameters of the kind's module.

        Raises:
            ConversionError: if no path in `weights` contains a parameter, or a path contains no parameter.
        """
        tensors, unused = {}, set(self.weights)
        for parameter in parameters:
            paths = [path for path in self.weights if path in ("", parameter) or parameter.startswith(f"{path}.")]
            if not paths:
                raise ConversionError(
                    f"block {self.name} names no tensor for parameter {parameter} of its kind {self.kind}: add a path that "
                    "contains the parameter to the block's weights"
                )
            path = max(paths, key=len)
            unused.discard(path)
            inside = parameter if not path else parameter[len(path) + 1 :]
            tensors[parameter] = ".".join(filter(None, (self.weights[path], inside)))
        if unused:
            path = min(unused)
            raise ConversionError(
                f'block {self.name} names tensors {self.weights[path]} for the path "{path}" of its kind {self.kind}, which '
                "contains no parameter: remove the path from the block's weights"
            )
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class HostStep:
    """A step that a runtime does between two graphs, such as placing image features among text embeddings.

    Attributes:
        function: `package.module:function`; called with (values, config), where `values` holds the available ones of
            `inputs`, it returns those of `outputs` that can be computed from them.
        inputs: names of the values that the step reads.
        outputs: names of the values that the step makes; it may replace a value of that name.
    """

    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, values: Mapping[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """Run the step; `values` (name -> array) may hold more than the step reads."""
        function: Callable[..., dict[str, np.ndarray]] = load_object(self.function)
        return function({name: values[name] for name in self.inputs if name in values}, config)


@dataclass(frozen=True)
class Component:
    """One graph of an artifact.

    Components feed each other by the names of their values: an input is an output of the host step, of an earlier
    component or of the processor. A component is skipped if one of its inputs is missing, such as the vision encoder for a
    prompt without an image.

    Attributes:
        name: name in the manifest, such as `language_model`.
        side: whether it belongs to the language model or to the vision encoder; each side has its own precision.
        role: what a runtime uses it for.
        kinds: name of a kind -> the kind.
        blocks: in the order of the data flow.
        inputs, outputs: ports of the shipped graph, in order, named as the values inside the component.
        state: input of a block -> output that replaces it in the next call, such as past_key_values.0.key -> present.0.key.
        logits: whether the component has an LM head.
        host_step: the step that a runtime does before the component.
        aliases: input or output -> the name under which OpenVINO's runtimes look for it, if that is another one.
        calibrated: whether calibration samples, which are prompts with one image, reach the component.
    """

    name: str
    side: Literal["vision", "language"]
    role: str
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
        """Names of the values that a block reads and no earlier block makes, state included."""
        made: set[str] = set()
        found: dict[str, None] = {}
        for block in self.blocks:
            found |= dict.fromkeys(value for value in block.inputs.values() if value not in made)
            made.update(block.outputs.values())
        return tuple(found)

    def bound(self, shapes: Mapping[str, TensorShapes]) -> Component:
        """The component with every block bound to its tensors.

        Args:
            shapes: kind -> parameter -> shape.

        Raises:
            ConversionError: if the weights of a block do not fit the parameters of its kind.
        """
        return replace(self, blocks=tuple(block.bound(shapes[block.kind]) for block in self.blocks))

    def tensor_names(self) -> set[str]:
        """In-memory names of all tensors that the component reads; it must be bound."""
        return {name for block in self.blocks for name in block.tensors.values()}


def operation_name(tensor: str) -> str:
    """The name that an operation in a graph has which reads a weight.

    It is the name of its layer; a parameter that is no layer's `weight` has that name itself.

    Args:
        tensor: in-memory name of the weight.
    """
    return tensor.removesuffix(".weight") if tensor.endswith(".weight") else f"{tensor}.operation"


def handed_over(components: tuple[Component, ...]) -> tuple[str, ...]:
    """Names of the vision side's outputs that the last component, which has the LM head, or its host step reads."""
    last = components[-1]
    taken = {*last.reads, *(last.host_step.inputs if last.host_step else ())}
    outputs = [port.name for part in components if part.side == "vision" for port in part.outputs]
    return tuple(name for name in outputs if name in taken)


def kinds_by_name(*kinds: Kind) -> dict[str, Kind]:
    """Kinds by name, as in `Component.kinds`.

    Raises:
        ConversionError: if two different kinds have the same name.
    """
    found: dict[str, Kind] = {}
    for kind in kinds:
        if found.setdefault(kind.name, kind) != kind:
            raise _collision(kind.name, found[kind.name].module, kind.module)
    return found


def kinds_of(components: Iterable[Component]) -> dict[str, Kind]:
    """All kinds of a family's components by name.

    Raises:
        ConversionError: if two different kinds have the same name, since traces are stored by name.
    """
    found: dict[str, tuple[str, Kind]] = {}
    for component in components:
        for kind in component.kinds.values():
            owner, other = found.setdefault(kind.name, (component.name, kind))
            if other != kind:
                raise _collision(kind.name, f"{other.module} in the {owner}", f"{kind.module} in the {component.name}")
    return {name: kind for name, (_, kind) in found.items()}


def _collision(name: str, one: str, other: str) -> ConversionError:
    return ConversionError(f"two kinds of block are called {name} ({one}, and {other}): give one of them another name")
