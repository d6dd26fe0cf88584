"""Passes that compress a block by statistics of the activations in it, which are gathered while the float chain computes it.

So every block runs once on each sample, and only the statistics are kept.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.activations import read_file
from manifests.errors import BadInputError
from manifests.files import read_json
from passes.base import Context, Intermediate
from passes.block_pass import BlockPass, FloatBlocks, SplitBlocks
from passes.chain import Compute, openvino_compute
from passes.checkpoint import Checkpoint
from passes.compat.nncf import WEIGHT_STATISTICS
from passes.compat.nncf_statistics import ChannelStatistics, Gather, Observed
from passes.export.template import BlockSource, Templates
from passes.store import digest
from passes.vocabulary import Block, Component, operation_name

if TYPE_CHECKING:
    import openvino as ov

__all__ = [
    "Observation",
    "ObservedSource",
    "ObservingPass",
    "WatchedBlocks",
    "layer_inputs",
    "observation_of",
    "observe_kinds",
]

_FILE = "observations.json"
# A kind of block, and those of its parameters whose layers stay float.
_Variant = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Observation:
    """What is observed in the blocks of one kind.

    Attributes:
        tensors: the tensors; their operations are positions in the order of the kind's graph.
        statistics: the statistics that are gathered, see `ChannelStatistics`.
        shared: port of the kind -> the weights (parameter, and axis of the input channels) of the layers that read it
            directly, if the result depends on all layers that read the same value.
    """

    tensors: Sequence[Observed]
    statistics: Sequence[str]
    shared: Mapping[str, Sequence[tuple[str, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class ObservedSource(BlockSource):
    """See `BlockSource`.

    Attributes:
        observations: file that says what is observed in each kind of block.
        statistics: for each sample that reaches the block, the file with the statistics of the observed tensors.
        readers: port of the kind -> the blocks that read the same value, each with its port; this block is among them.
    """

    observations: Path = Path()
    statistics: tuple[Path, ...] = ()
    readers: Mapping[str, Sequence[tuple[Block, str]]] = field(default_factory=dict)

    @property
    def floats(self) -> list[str]:
        """Names of the operations whose layers stay float."""
        return [operation_name(tensor) for tensor in sorted(self.layers) if self.layers[tensor] == "fp16"]

    def observed_model(self) -> tuple[ov.Model, Gather]:
        """The block's graph with its weights in memory, and the statistics of its observed tensors by their names in it.

        Names of operations are unique in the graph.

        Raises:
            BadInputError: if no sample reaches the block.
        """
        if not self.statistics:
            raise BadInputError(f"block {self.block.name}: no calibration sample reaches it: use int8")
        template = self.template()
        names = _unique_names(template)
        observation = observation_of(self.observations, _variant(self.block, self.layers))
        positions = {
            (names[int(tensor.operation)], tensor.output): position
            for position, tensor in enumerate(observation.tensors)
        }
        samples = [read_file(path) for path in self.statistics]

        def gather(tensor: Observed) -> list[ChannelStatistics]:
            position = positions[tensor.operation, tensor.output]
            return [
                ChannelStatistics(
                    {name: np.atleast_1d(sample[f"{position}.{name}"]) for name in observation.statistics},
                    tuple(int(size) for size in sample[f"{position}.shape"]),
                )
                for sample in samples
            ]

        return self.fill(template), gather


@dataclass(frozen=True)
class ObservingPass(BlockPass):
    """A block pass that gets statistics of activations."""

    @abstractmethod
    def observe(self, model: ov.Model, floats: Sequence[str]) -> Observation:
        """What is to be observed in a block.

        Args:
            model: the graph of the kind; its operations are named by their positions in the graph's order, and its weights,
                whose values mean nothing, are constants named after the parameters. Inputs are named after the ports.
            floats: names of the operations whose layers stay float.
        """

    def samples(self, context: Context) -> int:
        """Number of samples whose statistics the pass gets."""
        return context.vision_samples if self.quantizes_activations else context.samples

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, FloatBlocks)
        self.prepare(before, context)
        return super().__call__(before, context)

    def prepare(self, before: FloatBlocks, context: Context) -> None:
        """Find out what is to be observed now, while the helper process is running anyway."""
        self._observations(before.split, context)

    def inputs_key(self, split: SplitBlocks, index: int, context: Context) -> Any:
        """See `BlockPass`; the result may also depend on the weights of other blocks that read the same values."""
        component = split.component
        block = component.blocks[index]
        if not self.needs_activations(block.role):
            return None
        chain = context.chain
        number = chain.number(component, block)
        shared = observation_of(self._observations(split, context), (block.kind, ())).shared
        readers = {reader.name for port in shared for reader, _ in chain.readers(number, port)}
        rivals = [split.block_key(other) for other, block in enumerate(component.blocks) if block.name in readers]
        return [chain.inputs_key(number, self.samples(context)), rivals]

    def source(self, split: SplitBlocks, index: int, context: Context, layers: Mapping[str, str]) -> BlockSource:
        """See `BlockPass`."""
        block = split.component.blocks[index]
        made = split.source(index, layers)
        if not self.needs_activations(block.role):
            return made
        chain, file = context.chain, self._observations(split, context)
        number = chain.number(split.component, block)
        observation = observation_of(file, _variant(block, made.layers))
        watched = WatchedBlocks(split.checkpoint, split.templates, observation, chain.at_once)
        what = digest([asdict(tensor) for tensor in observation.tensors], list(observation.statistics))
        return ObservedSource(
            **vars(made),
            observations=file,
            statistics=chain.observe(number, what, watched, self.samples(context)),
            readers={port: chain.readers(number, port) for port in observation.shared},
        )

    def _observations(self, split: SplitBlocks, context: Context) -> Path:
        """The file that says what is observed in each kind of block; it is made if the store lacks it."""
        blocks = [block for block in split.component.blocks if self.needs_activations(block.role)]
        variants = {_variant(block, context.layers) for block in blocks} | {(block.kind, ()) for block in blocks}
        ordered = sorted(variants)
        key = digest("observations", str(self), self.version, split.templates.folder.name, ordered)
        if key not in context.store:
            context.store.get_or_make(
                key,
                lambda folder: context.in_helper(observe_kinds, self, split.templates, ordered, folder),
                f"tensors that {self.name} looks at",
            )
        return context.store.path(key) / _FILE


@dataclass(frozen=True)
class WatchedBlocks:
    """The float blocks of a checkpoint, whose outputs are followed by statistics of the observed tensors."""

    checkpoint: Checkpoint
    templates: Templates
    observation: Observation
    at_once: int = 1

    def compute(self, component: Component, block: Block) -> Compute:
        """See `passes.chain.BlockModels`; statistics are named `3.least` and so on, by the position of the tensor."""
        from openvino import opset13

        source = BlockSource(self.checkpoint, self.templates, block)
        model = source.template()
        operations = model.get_ordered_ops()
        results = []
        for position, tensor in enumerate(self.observation.tensors):
            output = operations[int(tensor.operation)].output(tensor.output)
            for name in (*self.observation.statistics, "shape"):
                result = opset13.result(_statistic(output, tensor.axis, name))
                result.set_friendly_name(f"{position}.{name}")
                results.append(result)
        model.add_results(results)
        return openvino_compute(source.fill(model), self.at_once)


def _statistic(output: ov.Output, axis: int | None, name: str) -> ov.Node:
    """The operation that computes a statistic of a tensor, with the operations by which NNCF computes it."""
    from openvino import opset13

    if name == "shape":
        return opset13.shape_of(output)
    if name == "max_variance":
        difference = opset13.squared_difference(opset13.reduce_mean(output, [1], True), output)
        return opset13.reduce_max(
            opset13.reduce_mean(difference, [1], True), list(range(len(output.partial_shape))), False
        )
    axes = [place for place in range(len(output.partial_shape)) if place != axis]
    reduce = {"least": opset13.reduce_min, "greatest": opset13.reduce_max, "mean": opset13.reduce_mean}[name]
    return reduce(output, axes, False)


def layer_inputs(model: ov.Model) -> Observation:
    """The inputs of all layers of a graph, and their statistics that compression of weights needs; see `ObservingPass.observe`."""
    found: dict[Observed, None] = {}
    for node in model.get_ordered_ops():
        inputs = list(node.input_values()) if node.get_type_name() == "MatMul" else []
        for weight, value in zip(inputs, reversed(inputs), strict=True):
            if weight.get_node().get_type_name() == "Constant":
                axis = len(value.partial_shape) - 1
                found[Observed(value.get_node().get_friendly_name(), value.get_index(), axis)] = None
    return Observation(list(found), WEIGHT_STATISTICS)


def observation_of(file: Path, variant: _Variant) -> Observation:
    """Read from a file what is observed in a variant of a kind."""
    for entry in read_json(file, f"delete {file.parent}"):
        if (entry["kind"], tuple(entry["floats"])) == variant:
            tensors = [Observed(**tensor) for tensor in entry["tensors"]]
            return Observation(tensors, entry["statistics"], entry["shared"])
    raise KeyError(variant)


def _variant(block: Block, layers: Mapping[str, str]) -> _Variant:
    return block.kind, tuple(parameter for parameter, tensor in block.tensors.items() if layers.get(tensor) == "fp16")


def observe_kinds(item: ObservingPass, templates: Templates, variants: Sequence[_Variant], folder: Path) -> None:
    """Write what is observed in each variant of a kind."""
    import openvino as ov

    entries = []
    for kind, floats in variants:
        model = ov.Core().read_model(templates.folder / f"{kind}.xml")
        positions: dict[str, str] = {}
        ignored = []
        for position, node in enumerate(model.get_ordered_ops()):
            if node.get_friendly_name() in floats:
                ignored += [target.get_node() for target in node.output(0).get_target_inputs()]
            if node.get_type_name() != "Parameter":
                node.set_friendly_name(str(position))
            positions[node.get_friendly_name()] = str(position)
        _fill_with_zeros(model, templates.shapes[kind])
        made = item.observe(model, [node.get_friendly_name() for node in ignored])
        tensors = [replace(tensor, operation=positions[tensor.operation]) for tensor in made.tensors]
        entries.append({"kind": kind, "floats": floats, **asdict(replace(made, tensors=tensors))})
    (folder / _FILE).write_text(json.dumps(entries), encoding="utf-8")


def _fill_with_zeros(model: ov.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the inputs that stand for weights, whose shapes are given, by constants of the same names."""
    import openvino as ov

    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name in shapes:
            constant = ov.op.Constant(np.zeros(shapes[name], np.float32), shared_memory=True)
            constant.set_friendly_name(name)
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _unique_names(model: ov.Model) -> list[str]:
    """Give every operation a name of its own; returns the names in the order of the operations."""
    taken: set[str] = set()
    names = []
    for node in model.get_ordered_ops():
        name, count = node.get_friendly_name(), 0
        while name in taken:
            count += 1
            name = f"{node.get_friendly_name()}_{count}"
        taken.add(name)
        node.set_friendly_name(name)
        names.append(name)
    return names
