"""The float chain: the activations that reach each block of the float model, computed block by block and kept in the store.

AWQ's statistics come from the float model, so once these activations are known, each block can be compressed by itself. Only
one block's weights are in memory at a time.
"""

from __future__ import annotations

import threading
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.activations import BlockInputs, activation_names, read_activations, write_activations
from passes.checkpoint import Checkpoint
from passes.export.template import BlockSource, Templates
from passes.store import Store, digest
from passes.vocabulary import Block, Component, HostStep

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["BlockModels", "CheckpointBlocks", "Compute", "FloatChain", "compile_block", "openvino_compute"]

# Called for each sample with its name and the inputs and outputs of a block, by port. Outputs are views of a reused buffer. If
# several samples are computed at the same time, it is called in several threads.
Look = Callable[[str, dict[str, np.ndarray], dict[str, np.ndarray]], None]

# Computes a block: takes its inputs by port, and returns its outputs by port, which may be views of a reused buffer.
Compute = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]

VERSION = 2
_INPUTS = -1


class BlockModels(Protocol):
    """A source of single blocks: a checkpoint or a finished artifact."""

    def compute(self, component: Component, block: Block) -> Compute:
        """Load one block with its weights, and return the function that computes it."""
        ...


@dataclass(frozen=True)
class CheckpointBlocks:
    """The float blocks of a checkpoint.

    Attributes:
        at_once: number of samples that are computed at the same time.
    """

    checkpoint: Checkpoint
    templates: Templates
    at_once: int = 1

    def compute(self, component: Component, block: Block) -> Compute:
        """See `BlockModels`."""
        return openvino_compute(BlockSource(self.checkpoint, self.templates, block).model(), self.at_once)


def compile_block(model: ov.Model, at_once: int = 1) -> ov.CompiledModel:
    """Compile a block for the CPU, to compute in float32, whatever the dtype of its weights.

    Args:
        model: the block's graph.
        at_once: number of samples that are computed at the same time.
    """
    import openvino as ov

    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "NUM_STREAMS": at_once}
    return ov.Core().compile_model(model, "CPU", options)


def openvino_compute(model: ov.Model, at_once: int = 1) -> Compute:
    """Compile a block for the CPU, and return the function that computes it.

    Args:
        model: the block's graph, with inputs and outputs in the order of the kind's ports and named after them.
        at_once: number of threads that may call the function at the same time; each has a buffer of its own.
    """
    compiled = compile_block(model, at_once)
    own = threading.local()
    names = [result.get_friendly_name() for result in model.get_results()]

    def compute(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        request = own.request
        request.infer(values, share_inputs=True)
        return {name: request.get_output_tensor(index).data for index, name in enumerate(names)}

    return compute


@dataclass
class FloatChain:
    """Activations of all components on the same samples.

    Blocks are numbered consecutively over all components; a component's host step has the number before its first block. An
    input of a component is looked up by name: first among the outputs of its host step, then among those of earlier
    components, then among the samples' inputs. A block is not computed for samples that lack one of its inputs, such as the
    resampler of videos for a sample without a video.

    Attributes:
        blocks: the blocks that the activations flow through.
        config: the config with every default filled in.
        identity: digest of the blocks' weights, their templates and the library versions, which all results depend on.
        samples: folder with the samples' inputs, as `calibration.inputs.write_inputs` writes it.
        samples_digest: takes a number, and returns the digest of the inputs of that many samples, the first ones.
        counts: name of a component -> number of samples that flow through it; no component has more than an earlier one.
        at_once: number of samples that are computed at the same time, for which `blocks` must be made.
        watch: called after each sample with the component and the block that has been computed.
        nodes: the blocks and host steps by their numbers, each with its component.
        producers: for each node, input -> the node that makes it and the name that it has there.
        consumers: for each node, those that read what it makes.
    """

    store: Store
    blocks: BlockModels
    components: tuple[Component, ...]
    config: dict[str, Any]
    identity: str
    samples: Path
    samples_digest: Callable[[int], str]
    counts: Mapping[str, int]
    at_once: int = 1
    watch: Callable[[Component, Block], None] = lambda component, block: None
    nodes: list[tuple[Component, Block | HostStep]] = field(init=False)
    producers: list[dict[str, tuple[int, str]]] = field(init=False)
    consumers: list[set[int]] = field(init=False)
    _waiting: set[int] = field(init=False)
    _keys: dict[tuple[int, int], str] = field(init=False, default_factory=dict)
    _made: set[int] = field(init=False, default_factory=set)
    _observed: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.nodes = []
        self.producers = []
        finished: dict[str, tuple[int, str]] = {}
        for component in self.components:
            latest: dict[str, tuple[int, str]] = {}
            sources = ChainMap(latest, finished)
            step = component.host_step
            if step is not None:
                self.producers.append({value: sources.get(value, (_INPUTS, value)) for value in step.inputs})
                latest |= {value: (len(self.nodes), value) for value in step.outputs}
                self.nodes.append((component, step))
            for block in component.blocks:
                self.producers.append(
                    {port: sources.get(value, (_INPUTS, value)) for port, value in block.inputs.items()}
                )
                latest |= {value: (len(self.nodes), port) for port, value in block.outputs.items()}
                self.nodes.append((component, block))
            finished = finished | {port.name: latest[port.name] for port in component.outputs}
        self.consumers = [set() for _ in self.nodes]
        for consumer, producers in enumerate(self.producers):
            for producer, _ in producers.values():
                if producer != _INPUTS:
                    self.consumers[producer].add(consumer)
        self._waiting = self._blocks()

    def number(self, component: Component, block: Block) -> int:
        """The number of a block in the chain."""
        return next(
            number
            for number, (owner, other) in enumerate(self.nodes)
            if owner.name == component.name and isinstance(other, Block) and other.name == block.name
        )

    def readers(self, number: int, port: str) -> tuple[tuple[Block, str], ...]:
        """The blocks of a component, each with its port, that read the same value as one of them does at a port."""
        source, owner = self.producers[number][port], self.nodes[number][0]
        return tuple(
            (node, other)
            for (component, node), producers in zip(self.nodes, self.producers, strict=True)
            if component is owner and isinstance(node, Block)
            for other, producer in producers.items()
            if producer == source
        )

    def inputs(self, number: int) -> tuple[BlockInputs, ...]:
        """Where to read the inputs of a block, for each sample that has all of them; missing ones are computed first."""
        sources = self.producers[number]
        return tuple(found for found in self._per_sample(number, sources) if len(found) == len(sources))

    def available(self, number: int) -> tuple[BlockInputs, ...]:
        """Where to read those inputs of a block or host step that a sample has, for each sample."""
        return tuple(self._per_sample(number, self.producers[number]))

    def visit(self, number: int, look: Look, blocks: BlockModels | None = None) -> None:
        """Compute a block on all samples, and call `look` for each.

        The store keeps the outputs that later blocks read.

        Args:
            number: the block.
            look: called for each sample.
            blocks: computes the block instead of the chain's own blocks.
        """
        self._made.discard(number)
        for producer, _ in self.producers[number].values():
            self._ensure(producer)
        self.store.remove(self._key(number))
        self._make(number, blocks, look)

    def observe(self, number: int, observer: str, blocks: BlockModels, count: int) -> tuple[Path, ...]:
        """Compute a block on all samples, and keep further values that are found on the way, in one file for each sample.

        The block's inputs are not needed any more afterwards.

        Args:
            number: the block.
            observer: digest of everything that determines which values are kept.
            blocks: computes the block; what it returns besides the block's outputs is kept.
            count: number of samples whose files are returned.

        Returns:
            The files of those of the first `count` samples that reach the block.
        """
        key = digest("observed", observer, self._key(number))
        component, node = self.nodes[number]
        assert isinstance(node, Block)
        ports = {port.name for port in component.kinds[node.kind].outputs}

        def make(folder: Path) -> None:
            def look(sample: str, _: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
                write_activations(
                    folder / sample, {name: value for name, value in outputs.items() if name not in ports}
                )

            self.visit(number, look, blocks)

        folder = self.store.get_or_make(key, make, f"statistics of {component.name}, block {node.name}")
        self._observed.add(key)
        self.done({number})
        first = {path.name for path in sorted(self.samples.iterdir())[:count]}
        return tuple(path for path in sorted(folder.iterdir()) if path.name in first)

    def inputs_key(self, number: int, count: int | None = None) -> str:
        """Digest of a block's inputs on the first `count` samples; None takes all that flow through its component."""
        return self._inputs_digest(number, self._count(number) if count is None else count)

    def done(self, numbers: set[int]) -> None:
        """Say that the inputs of these blocks will not be read any more.

        Activations are removed from the store as soon as the blocks that read them are done, and their outputs are computed.
        """
        self._waiting -= numbers
        self._drop()

    def clear(self) -> None:
        """Remove from the store all activations, and all that has been observed; all blocks wait for their inputs again."""
        for number in range(len(self.nodes)):
            self.store.remove(self._key(number))
        self._made.clear()
        self._waiting = self._blocks()
        for key in self._observed:
            self.store.remove(key)

    def _blocks(self) -> set[int]:
        return {number for number, (_, node) in enumerate(self.nodes) if isinstance(node, Block)}

    def _drop(self) -> None:
        """Remove from the store the activations that no block will read any more."""
        for number in sorted(self._made):
            if all(map(self._has_read, self.consumers[number])):
                self.store.remove(self._key(number))

    def _has_read(self, consumer: int) -> bool:
        return consumer not in self._waiting and (consumer in self._made or not self.consumers[consumer])

    def _count(self, number: int) -> int:
        return self.counts[self.nodes[number][0].name]

    def _key(self, number: int) -> str:
        """Key of the outputs of a block or host step in the store."""
        return self._digest(number, self._count(number))

    def _digest(self, number: int, count: int) -> str:
        """Digest of the outputs of a block or host step on the first `count` samples."""
        if (number, count) not in self._keys:
            node = self.nodes[number][1]
            what = (node.kind, node.weights) if isinstance(node, Block) else (node.function, self.config)
            inputs = self._inputs_digest(number, count)
            self._keys[number, count] = digest("float-chain", VERSION, self.identity, what, inputs)
        return self._keys[number, count]

    def _inputs_digest(self, number: int, count: int) -> str:
        return digest(
            {
                port: [self.samples_digest(count) if producer == _INPUTS else self._digest(producer, count), name]
                for port, (producer, name) in self.producers[number].items()
            }
        )

    def _per_sample(self, number: int, sources: dict[str, tuple[int, str]]) -> Iterator[BlockInputs]:
        """Where to read those values that a sample has, for each sample that flows through the component of a node."""
        for producer, _ in sources.values():
            self._ensure(producer)
        for sample in sorted(self.samples.iterdir())[: self._count(number)]:
            files = {producer: self._file(producer, sample.name) for producer, _ in sources.values()}
            names = {producer: activation_names(file) for producer, file in files.items()}
            yield {
                port: (files[producer], name) for port, (producer, name) in sources.items() if name in names[producer]
            }

    def _file(self, producer: int, sample: str) -> Path:
        folder = self.samples if producer == _INPUTS else self.store.path(self._key(producer))
        return folder / sample

    def _ensure(self, number: int) -> None:
        # Computed in order, starting after the nearest blocks whose results are in the store.
        needed, pending = [], [number]
        while pending:
            current = pending.pop()
            if current == _INPUTS or current in needed:
                continue
            if self._key(current) in self.store:
                self._made.add(current)
                continue
            needed.append(current)
            pending += [producer for producer, _ in self.producers[current].values()]
        self._made.difference_update(needed)
        for current in sorted(needed):
            self._make(current)

    def _make(self, number: int, blocks: BlockModels | None = None, look: Look | None = None) -> None:
        component, node = self.nodes[number]
        what = f"block {node.name}" if isinstance(node, Block) else "inputs"
        run = partial(self._run, number, blocks=blocks, look=look)
        self.store.get_or_make(self._key(number), run, f"activations of {component.name}, {what}", lasting=False)
        self._made.add(number)
        self._drop()

    def _run(self, number: int, folder: Path, blocks: BlockModels | None, look: Look | None) -> None:
        component, node = self.nodes[number]
        if isinstance(node, HostStep):
            self._run_host_step(number, node, folder)
            return
        wanted = self.wanted(number)
        compute = (blocks or self.blocks).compute(component, node)

        def run(inputs: BlockInputs) -> None:
            sample = next(iter(inputs.values()))[0].name
            values = read_activations(inputs)
            outputs = compute(values)
            write_activations(folder / sample, {port: value for port, value in outputs.items() if port in wanted})
            if look is not None:
                look(sample, values, outputs)

        samples = self.inputs(number)
        # An exception must reach the caller after all threads have ended, since the folder is removed then.
        with ThreadPoolExecutor(self.at_once) as threads:
            for _ in threads.map(run, samples):
                self.watch(component, node)

    def _run_host_step(self, number: int, step: HostStep, folder: Path) -> None:
        wanted = self.wanted(number)
        for inputs in self._per_sample(number, self.producers[number]):
            made = step(read_activations(inputs), self.config)
            if kept := {name: value for name, value in made.items() if name in wanted}:
                sample = next(iter(inputs.values()))[0].name
                write_activations(folder / sample, kept)

    def wanted(self, number: int) -> set[str]:
        """Output ports of a block that later blocks read."""
        return {port for producers in self.producers for producer, port in producers.values() if producer == number}
