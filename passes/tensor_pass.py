"""Tensor passes, which turn a tensor of a checkpoint into one or several tensors, in small pieces of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.architecture import Architecture
from passes.base import Context, Effort, Form, Intermediate, TransformPass
from passes.checkpoint import Checkpoint
from passes.export.safetensors import CHUNK, Entry, raw_chunks, ring
from passes.header import TensorInfo
from passes.opened import OpenedCheckpoint
from passes.store import Store, digest

if TYPE_CHECKING:
    from passes.export.segments import Segments

__all__ = ["FLOAT", "Chunks", "MadeTensor", "StoredTensor", "TensorPass", "Tensors", "chunks_of"]

# Kind of a tensor that no pass has changed.
FLOAT = "FLOAT"

Chunks = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint.

    Attributes:
        name: the in-memory name, which transformers gives it.
        on_hub: the on-hub name, which checkpoints on the hub give it.
        source: the name in this checkpoint's files.
        info: dtype, shape and place of its bytes.
    """

    name: str
    on_hub: str
    source: str
    info: TensorInfo


@dataclass(frozen=True)
class MadeTensor:
    """One tensor to be written; its bytes are made while they are written.

    Attributes:
        entry: name, dtype, shape and size.
        chunks: makes the bytes, in views that stay valid as long as `manifests.files.write_hashed` requires.
        kind: tells readers of the artifact how the tensor is stored, such as `FLOAT` or `W8A16`.
    """

    entry: Entry
    chunks: Callable[[], Chunks]
    kind: str = FLOAT


def chunks_of(tensors: Iterable[MadeTensor]) -> Iterator[bytes | memoryview]:
    """The bytes of tensors, one after the other."""
    for tensor in tensors:
        yield from tensor.chunks()


class Tensors(Intermediate):
    """All tensors of a checkpoint, and the tensors that each is turned into; only metadata has been read.

    Args:
        checkpoint: the checkpoint that holds the tensors.
        architecture: the names of the tensors.
        key: see `Intermediate`.
        make: returns the tensors that one tensor is turned into, which stay together in one file; by default, the tensor
            itself.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        key: str,
        make: Callable[[StoredTensor], Sequence[MadeTensor]] | None = None,
    ) -> None:
        self.checkpoint, self.architecture, self.key = checkpoint, architecture, key
        self.make = make or self.unchanged
        self._segments: Segments | None = None

    @classmethod
    def of(cls, opened: Intermediate) -> Tensors:
        """All tensors of an opened checkpoint, unchanged; the result of a tensor pass is returned as it is."""
        if isinstance(opened, Tensors):
            return opened
        assert isinstance(opened, OpenedCheckpoint)
        return cls(opened.checkpoint, opened.templates.architecture, opened.key)

    def followed_by(self, item: TensorPass) -> Tensors:
        """The tensors after a pass."""
        key = digest(self.key, str(item), item.version)
        return Tensors(self.checkpoint, self.architecture, key, item.converter(self))

    def stored(self) -> Iterator[StoredTensor]:
        """The checkpoint's tensors, tied ones included, in the order in which their bytes lie in the files."""
        for name in self.architecture.in_file_order(self.checkpoint):
            source = self.architecture.source(name)
            yield StoredTensor(name, self.architecture.on_hub[name], source, self.checkpoint.tensors[source])

    def made(self) -> list[list[MadeTensor]]:
        """The tensors to be written: one list for each tensor of the checkpoint."""
        return [list(self.make(tensor)) for tensor in self.stored()]

    def keep_in(self, store: Store) -> Segments:
        """What keeps the bytes of the tensors to be written until `discard`."""
        from passes.export.segments import Segments

        self._segments = Segments(store, self.key)
        return self._segments

    def discard(self) -> None:
        """See `Intermediate`."""
        if self._segments is not None:
            self._segments.discard()

    def unchanged(self, tensor: StoredTensor) -> list[MadeTensor]:
        """The tensor under its on-hub name, with its bytes as they are."""

        def chunks() -> Chunks:
            return (chunk.data for chunk in raw_chunks(self.checkpoint.folder, tensor.info, ring(CHUNK)))

        info = tensor.info
        return [MadeTensor(Entry(tensor.on_hub, info.dtype, info.shape, info.byte_size), chunks)]


@dataclass(frozen=True)
class TensorPass(TransformPass, ABC):
    """A pass over the tensors of a checkpoint, for runtimes that have the model's graph themselves."""

    takes: ClassVar[tuple[Form, ...]] = (Form.CHECKPOINT,)

    @property
    def makes(self) -> Form:
        return Form.TENSORS

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        return Tensors.of(before).followed_by(self)

    def effort(self, role: str) -> Effort | None:
        """See `TransformPass`; only pieces of a tensor are in memory."""
        return Effort(0.0, 4.0)

    @abstractmethod
    def converter(self, tensors: Tensors) -> Callable[[StoredTensor], Sequence[MadeTensor]]:
        """The function that turns one tensor into those that take its place.

        Args:
            tensors: all tensors; their metadata may be read here, their values only while chunks are made.

        Returns:
            A function that takes a tensor and returns those that take its place: `tensors.unchanged(tensor)` to keep it.

        Raises:
            BadInputError: if the options do not fit the checkpoint.
        """
