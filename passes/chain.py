"""The float chain: what every block of a model sees, computed block by block from the samples and kept in the store.

AWQ's statistics come from the float model, so once the activations have flowed through the chain, each block can be
compressed alone. Only one block's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from calibration.activations import BlockInputs, read_activations, write_activations
from passes.checkpoint import Checkpoint
from passes.export.template import BlockSource, Templates
from passes.split import Block, Component
from passes.store import Store, digest

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["BlockModels", "CheckpointBlocks", "FloatChain", "compile_block"]

# What is shown of a block for one sample: its inputs and its outputs by port. The outputs are views of a reused buffer.
Look = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None]

VERSION = 1
_INPUTS = -1


class BlockModels(Protocol):
    """Where the graphs of single blocks come from: a checkpoint, or a finished artifact."""

    def model(self, component: Component, block: Block) -> ov.Model:
        """One block with its weights, its inputs and outputs in the order of the kind's ports and named after them."""
        ...


@dataclass(frozen=True)
class CheckpointBlocks:
    """The float blocks of a checkpoint."""

    checkpoint: Checkpoint
    templates: Templates

    def model(self, component: Component, block: Block) -> ov.Model:
        """See `BlockModels`."""
        return BlockSource(self.checkpoint, self.templates, block).model()


def compile_block(model: ov.Model) -> ov.CompiledModel:
    """A block for the CPU, computing in float32 whatever its weights are stored in."""
    import openvino as ov

    return ov.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    )


@dataclass
class FloatChain:
    """Activations of all components on the same samples.

    Blocks are numbered through all components in order. A component finds an input among the outputs of an earlier one
    by name (the language model its cross-attention keys and values), else in the samples' inputs.

    Attributes:
        blocks: the blocks that the activations flow through.
        identity: digest of the blocks' weights, their templates and the library versions, which all results depend on.
        samples: folder with the samples' inputs, as `calibration.inputs.write_inputs` leaves it.
        samples_key: digest of those inputs.
        count: how many samples flow through the chain.
    """

    store: Store
    blocks: BlockModels
    components: tuple[Component, ...]
    identity: str
    samples: Path
    samples_key: str
    count: int
    _nodes: list[tuple[Component, Block]] = field(init=False)
    _producers: list[dict[str, tuple[int, str]]] = field(init=False)
    _keys: dict[int, str] = field(init=False, default_factory=dict)
    _gone: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._nodes = [(component, block) for component in self.components for block in component.blocks]
        self._producers = []
        finished: dict[str, tuple[int, str]] = {}
        latest: dict[str, tuple[int, str]] = {}
        for number, (component, block) in enumerate(self._nodes):
            if number and component is not self._nodes[number - 1][0]:
                outputs = {port.name for port in self._nodes[number - 1][0].outputs}
                finished |= {name: source for name, source in latest.items() if name in outputs}
                latest = {}
            self._producers.append(
                {
                    port: latest.get(value) or finished.get(value) or (_INPUTS, value)
                    for port, value in block.inputs.items()
                }
            )
            latest |= {value: (number, port) for port, value in block.outputs.items()}

    def number(self, component: Component, block: Block) -> int:
        """The number of a block."""
        return next(
            number
            for number, (owner, other) in enumerate(self._nodes)
            if owner.name == component.name and other.name == block.name
        )

    def inputs(self, number: int) -> tuple[BlockInputs, ...]:
        """Where the inputs of a block lie for each sample, computing what is not in the store yet."""
        for producer, _ in self._producers[number].values():
            self._ensure(producer)
        return tuple(
            {
                port: (self._file(producer, sample.name), name)
                for port, (producer, name) in self._producers[number].items()
            }
            for sample in sorted(self.samples.iterdir())[: self.count]
        )

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
        component = self._nodes[consumer][0]
        if component is self.components[-1] and consumer not in done:
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
            block = self._nodes[number][1]
            self._keys[number] = digest(
                "float-chain", VERSION, self.identity, block.kind, block.tensors, self.inputs_key(number)
            )
        return self._keys[number]

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
        component, block = self._nodes[number]
        wanted = self._wanted(number)
        ports = [port.name for port in component.kinds[block.kind].outputs]
        request = compile_block(self.blocks.model(component, block)).create_infer_request()
        for inputs in self.inputs(number):
            sample = next(iter(inputs.values()))[0].name
            values = read_activations(inputs)
            request.infer(values, share_inputs=True)
            outputs = {port: request.get_output_tensor(index).data for index, port in enumerate(ports)}
            write_activations(folder / sample, {port: value for port, value in outputs.items() if port in wanted})
            if look is not None:
                look(values, outputs)

    def _wanted(self, number: int) -> set[str]:
        """Ports of a block that a later block reads."""
        return {port for producers in self._producers for producer, port in producers.values() if producer == number}
