"""The float chain: what every block of a model sees, computed block by block from the samples and kept in the store.

AWQ's statistics come from the float model, so once the activations have flowed through the chain, each block can be
compressed alone. Only one block's weights are in memory at a time.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.activations import BlockInputs, activation_names, read_activations, write_activations
from passes.checkpoint import Checkpoint
from passes.export.template import BlockSource, Templates
from passes.split import Block, Component, HostStep
from passes.store import Store, digest

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["BlockModels", "CheckpointBlocks", "Compute", "FloatChain", "compile_block", "openvino_compute"]

# What is shown of a block for one sample: its inputs and its outputs by port. The outputs are views of a reused buffer.
Look = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None]

# Computes a block: inputs by port to outputs by port, which may be views of a reused buffer.
Compute = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]

VERSION = 2
_INPUTS = -1


class BlockModels(Protocol):
    """Where single blocks come from: a checkpoint, or a finished artifact."""

    def compute(self, component: Component, block: Block) -> Compute:
        """One block with its weights, ready to be computed."""
        ...


@dataclass(frozen=True)
class CheckpointBlocks:
    """The float blocks of a checkpoint."""

    checkpoint: Checkpoint
    templates: Templates

    def compute(self, component: Component, block: Block) -> Compute:
        """See `BlockModels`."""
        return openvino_compute(BlockSource(self.checkpoint, self.templates, block).model())


def compile_block(model: ov.Model) -> ov.CompiledModel:
    """A block for the CPU, computing in float32 whatever its weights are stored in."""
    import openvino as ov

    return ov.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    )


def openvino_compute(model: ov.Model) -> Compute:
    """A block's graph, its inputs and outputs in the order of the kind's ports and named after them, on the CPU."""
    request = compile_block(model).create_infer_request()
    names = [result.get_friendly_name() for result in model.get_results()]

    def compute(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        request.infer(values, share_inputs=True)
        return {name: request.get_output_tensor(index).data for index, name in enumerate(names)}

    return compute


@dataclass
class FloatChain:
    """Activations of all components on the same samples.

    Blocks are numbered through all components in order, a component's host step before its first block. A component finds
    an input among what its host step makes, then among the outputs of an earlier one by name (the language model its
    cross-attention keys and values), else in the samples' inputs. A sample that lacks an input of a block, as one without
    a video lacks that of a video's resampler, passes the block by.

    Attributes:
        blocks: the blocks that the activations flow through.
        config: the completed config.
        identity: digest of the blocks' weights, their templates and the library versions, which all results depend on.
        samples: folder with the samples' inputs, as `calibration.inputs.write_inputs` leaves it.
        samples_key: digest of those inputs.
        count: how many samples flow through the chain.
    """

    store: Store
    blocks: BlockModels
    components: tuple[Component, ...]
    config: dict[str, Any]
    identity: str
    samples: Path
    samples_key: str
    count: int
    _nodes: list[tuple[Component, Block | HostStep]] = field(init=False)
    _producers: list[dict[str, tuple[int, str]]] = field(init=False)
    _reads: dict[str, dict[str, tuple[int, str]]] = field(init=False, default_factory=dict)
    _keys: dict[int, str] = field(init=False, default_factory=dict)
    _gone: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._nodes = []
        self._producers = []
        finished: dict[str, tuple[int, str]] = {}
        for component in self.components:
            latest: dict[str, tuple[int, str]] = {}
            sources = ChainMap(latest, finished)
            step = component.host_step
            if step is not None:
                self._producers.append({value: sources.get(value, (_INPUTS, value)) for value in step.inputs})
                latest |= {value: (len(self._nodes), value) for value in step.outputs}
                self._nodes.append((component, step))
            self._reads[component.name] = {value: sources.get(value, (_INPUTS, value)) for value in component.reads}
            for block in component.blocks:
                self._producers.append(
                    {port: sources.get(value, (_INPUTS, value)) for port, value in block.inputs.items()}
                )
                latest |= {value: (len(self._nodes), port) for port, value in block.outputs.items()}
                self._nodes.append((component, block))
            finished = finished | {port.name: latest[port.name] for port in component.outputs}

    def number(self, component: Component, block: Block) -> int:
        """The number of a block."""
        return next(
            number
            for number, (owner, other) in enumerate(self._nodes)
            if owner.name == component.name and isinstance(other, Block) and other.name == block.name
        )

    def component_inputs(self, component: Component) -> tuple[BlockInputs, ...]:
        """Where the inputs of a whole component lie for each sample that has them, the state's left out.

        What comes straight from the samples' inputs is there for more of them than flow through the chain.
        """
        sources = {name: source for name, source in self._reads[component.name].items() if name not in component.state}
        return tuple(found for found in self._per_sample(sources, every=True) if len(found) == len(sources))

    def inputs(self, number: int) -> tuple[BlockInputs, ...]:
        """Where the inputs of a block lie for each sample that has them, computing what is not in the store yet."""
        sources = self._producers[number]
        return tuple(found for found in self._per_sample(sources) if len(found) == len(sources))

    def visit(self, number: int, look: Look) -> None:
        """Compute a block on all samples and show each sample's inputs and outputs, of which later blocks' are kept."""
        for producer, _ in self._producers[number].values():
            self._ensure(producer)
        self.store.remove(self._key(number))
        self.store.get_or_make(self._key(number), partial(self._run, number, look=look))

    def inputs_key(self, number: int) -> str:
        """Digest of a block's inputs."""
        return digest({port: [self._key(producer), name] for port, (producer, name) in self._producers[number].items()})

    def forget(self, done: set[int]) -> None:
        """Remove activations that nobody needs any more.

        Args:
            done: blocks of the last component that have been compressed; blocks of the others count as done.
        """
        for number in range(len(self._nodes)):
            if number not in self._gone and all(self._has_read(consumer, done) for consumer in self._consumers(number)):
                self.store.remove(self._key(number))
                self._gone.add(number)

    def clear(self) -> None:
        """Remove all activations."""
        for number in range(len(self._nodes)):
            self.store.remove(self._key(number))

    def _has_read(self, consumer: int, done: set[int]) -> bool:
        component, node = self._nodes[consumer]
        if component is self.components[-1] and isinstance(node, Block) and consumer not in done:
            return False
        return consumer in self._gone or self._key(consumer) in self.store or not self._consumers(consumer)

    def _consumers(self, number: int) -> list[int]:
        return [
            consumer
            for consumer, producers in enumerate(self._producers)
            if any(producer == number for producer, _ in producers.values())
        ]

    def _key(self, number: int) -> str:
        if number == _INPUTS:
            return self.samples_key
        if number not in self._keys:
            node = self._nodes[number][1]
            what = (node.kind, node.tensors) if isinstance(node, Block) else (node.function, self.config)
            self._keys[number] = digest("float-chain", VERSION, self.identity, what, self.inputs_key(number))
        return self._keys[number]

    def _per_sample(self, sources: dict[str, tuple[int, str]], every: bool = False) -> Iterator[BlockInputs]:
        """Where values lie for each sample of the chain, or for `every` one; those values that it has."""
        for producer, _ in sources.values():
            self._ensure(producer)
        for sample in sorted(self.samples.iterdir())[: None if every else self.count]:
            files = {producer: self._file(producer, sample.name) for producer, _ in sources.values()}
            names = {producer: activation_names(file) for producer, file in files.items()}
            yield {
                port: (files[producer], name) for port, (producer, name) in sources.items() if name in names[producer]
            }

    def _file(self, producer: int, sample: str) -> Path:
        folder = self.samples if producer == _INPUTS else self.store.path(self._key(producer))
        return folder / sample

    def _ensure(self, number: int) -> None:
        if number == _INPUTS or self._key(number) in self.store:
            return
        # From the nearest block whose results are there, in order.
        needed, pending = [], [number]
        while pending:
            current = pending.pop()
            if current == _INPUTS or current in needed or self._key(current) in self.store:
                continue
            needed.append(current)
            pending += [producer for producer, _ in self._producers[current].values()]
        for current in sorted(needed):
            self.store.get_or_make(self._key(current), partial(self._run, current))

    def _run(self, number: int, folder: Path, look: Look | None = None) -> None:
        component, node = self._nodes[number]
        if isinstance(node, HostStep):
            self._run_host_step(number, node, folder)
            return
        wanted = self._wanted(number)
        compute = self.blocks.compute(component, node)
        for inputs in self.inputs(number):
            sample = next(iter(inputs.values()))[0].name
            values = read_activations(inputs)
            outputs = compute(values)
            write_activations(folder / sample, {port: value for port, value in outputs.items() if port in wanted})
            if look is not None:
                look(values, outputs)

    def _run_host_step(self, number: int, step: HostStep, folder: Path) -> None:
        wanted = self._wanted(number)
        for inputs in self._per_sample(self._producers[number]):
            made = step(read_activations(inputs), self.config)
            if kept := {name: value for name, value in made.items() if name in wanted}:
                sample = next(iter(inputs.values()))[0].name
                write_activations(folder / sample, kept)

    def _wanted(self, number: int) -> set[str]:
        """Ports of a block that a later block reads."""
        return {port for producers in self._producers for producer, port in producers.values() if producer == number}
