"""Block passes, which turn one block into another; they may run in other processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from passes.base import Context, Effort, Form, Intermediate, TransformPass
from passes.checkpoint import Checkpoint
from passes.export.ir import BLOCK_FILE, detach
from passes.export.names import block_names
from passes.export.template import BlockSource, Templates
from passes.store import digest
from passes.vocabulary import Component

if TYPE_CHECKING:
    from calibration.activations import BlockInputs
    from passes.export.ir import Detached

__all__ = ["BlockPass", "BlockResults", "Blocks", "FloatBlocks", "SplitBlocks", "StoredBlocks"]


@dataclass(frozen=True)
class SplitBlocks(Intermediate):
    """The blocks of a component as tensors of the checkpoint, not exported yet.

    Attributes:
        component: the component, its blocks bound to the checkpoint's tensors.
        checkpoint: the checkpoint that holds the tensors.
        templates: the traced kinds of block.
        identity: digest of the checkpoint, the traces and the library versions.
    """

    component: Component
    checkpoint: Checkpoint
    templates: Templates
    identity: str

    @property
    def key(self) -> str:  # type: ignore[override]
        """See `Intermediate`."""
        return digest("split", [self.block_key(index) for index in range(len(self.component.blocks))])

    def block_key(self, index: int) -> str:
        """Digest of everything that a block is made from."""
        block = self.component.blocks[index]
        return digest("block", self.identity, block.kind, block.tensors, block.role)

    def source(
        self, index: int, layers: Mapping[str, str] | None = None, activations: tuple[BlockInputs, ...] = ()
    ) -> BlockSource:
        """Everything that a pass needs to make a block; see `BlockSource`."""
        block = self.component.blocks[index]
        return BlockSource(self.checkpoint, self.templates, block, activations, _of_block(layers or {}, block.tensors))


class Blocks(Intermediate, ABC):
    """The blocks of a component as OpenVINO graphs.

    Attributes:
        component: the component that the blocks belong to.
        exact: whether all weights are those of the checkpoint in float32.
    """

    component: Component
    exact: bool = False

    @abstractmethod
    def detached(self, index: int) -> Detached:
        """A block's graph without its weights, and the places of their bytes."""


class FloatBlocks(Blocks):
    """Blocks with the checkpoint's float weights, exported from the blocks in `split` when they are needed."""

    split: SplitBlocks


class BlockResults:
    """The results of a block pass for some blocks of a component: one entry of the store for each block.

    Args:
        item: the pass.
        split: all blocks of the component.
        context: the services of the conversion.
        layers: tensor (in-memory name) -> the precision that this layer gets instead of the pass's own.
        indexes: indexes of the blocks to make.
    """

    def __init__(
        self, item: BlockPass, split: SplitBlocks, context: Context, layers: Mapping[str, str], indexes: Iterable[int]
    ) -> None:
        self._item, self._split, self._context, self._layers = item, split, context, layers
        self.keys = {index: self._key(index) for index in indexes}

    def make(self, last: bool) -> None:
        """Make in parallel the results that the store lacks; see `Context.make_blocks`."""
        self._context.make_blocks(self._item, self.keys, self._source, last)

    def folder(self, index: int) -> Path:
        """The folder in the store with the result for a block."""
        return self._context.store.path(self.keys[index])

    def discard(self) -> None:
        """Remove all results from the store."""
        for key in self.keys.values():
            self._context.store.remove(key)

    def _key(self, index: int) -> str:
        layers = sorted(_of_block(self._layers, self._split.component.blocks[index].tensors).items())
        inputs = self._item.inputs_key(self._split, index, self._context)
        return digest("block pass", str(self._item), self._item.version, self._split.block_key(index), inputs, layers)

    def _source(self, index: int) -> BlockSource:
        return self._item.source(self._split, index, self._context, self._layers)


class StoredBlocks(Blocks):
    """Blocks that a block pass writes into the store."""

    def __init__(self, item: BlockPass, split: SplitBlocks, context: Context, layers: Mapping[str, str]) -> None:
        self.component = split.component
        self._results = BlockResults(item, split, context, layers, range(len(split.component.blocks)))
        self.key = digest("blocks", list(self._results.keys.values()))

    def graph_file(self, index: int) -> Path:
        """The .xml file of a block's graph."""
        return self._results.folder(index) / BLOCK_FILE

    def detached(self, index: int) -> Detached:
        """See `Blocks`."""
        return detach(self.graph_file(index), block_names(self.component.blocks[index]))

    def prepare(self) -> None:
        """See `Intermediate`."""
        self._results.make(last=True)

    def discard(self) -> None:
        """See `Intermediate`."""
        self._results.discard()


@dataclass(frozen=True)
class BlockPass(TransformPass, ABC):
    """A pass over one block: it takes a block with float32 weights, and writes a compressed block into the store."""

    takes: ClassVar[tuple[Form, ...]] = (Form.F32_BLOCKS,)

    @property
    def makes(self) -> Form:
        return Form.COMPRESSED_BLOCKS

    @abstractmethod
    def run(self, source: BlockSource, output: Path) -> None:
        """Write the transformed block as `block.xml` and `block.bin` into the folder `output`.

        Args:
            source: the block's template, its weights and, if `needs_activations`, the activations that reach it.
            output: an existing empty folder.
        """

    def effort(self, role: str) -> Effort | None:
        """See `TransformPass`; by default, that of `nncf.compress_weights`."""
        return Effort(1.35, 7.5, 50_000_000)

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, FloatBlocks)
        return StoredBlocks(self, before.split, context, self.layers(before, context))

    def inputs_key(self, split: SplitBlocks, index: int, context: Context) -> Any:
        """What a block's result depends on besides the block and the pass, as values that JSON can hold."""
        block = split.component.blocks[index]
        if not self.needs_activations(block.role):
            return None
        return context.chain.inputs_key(context.chain.number(split.component, block))

    def source(self, split: SplitBlocks, index: int, context: Context, layers: Mapping[str, str]) -> BlockSource:
        """Everything that the pass needs to make a block; the activations that reach the block are computed here.

        Args:
            split: all blocks of the component.
            index: index of the block.
            context: the services of the conversion.
            layers: tensor (in-memory name) -> the precision that this layer gets instead of the pass's own.
        """
        block = split.component.blocks[index]
        activations: tuple[BlockInputs, ...] = ()
        if self.needs_activations(block.role):
            activations = context.chain.inputs(context.chain.number(split.component, block))
        return split.source(index, layers, activations)

    def layers(self, blocks: FloatBlocks, context: Context) -> Mapping[str, str]:
        """Tensor (in-memory name) -> the precision that the recipe gives this layer instead of the pass's own."""
        return context.layers


def _of_block(layers: Mapping[str, str], tensors: Mapping[str, str]) -> dict[str, str]:
    own = set(tensors.values())
    return {tensor: precision for tensor, precision in layers.items() if tensor in own}
