"""*split-rows*: every matrix as several, one for each device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from manifests.errors import BadInputError
from passes.export.safetensors import CHUNK, Entry, raw_chunks, ring
from passes.tensor_pass import Chunks, MadeTensor, StoredTensor, TensorPass, Tensors

__all__ = ["SplitRowsPass"]


@dataclass(frozen=True)
class SplitRowsPass(TensorPass):
    """The rows of a matrix divided among `ranks` devices; whatever does not divide stays whole."""

    name = "split-rows"

    ranks: int = 2

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise BadInputError(f"ranks {self.ranks} is too small: use 1 or more")

    def converter(self, tensors: Tensors) -> Callable[[StoredTensor], Sequence[MadeTensor]]:
        def convert(tensor: StoredTensor) -> Sequence[MadeTensor]:
            shape = tensor.info.shape
            if len(shape) < 2 or shape[0] % self.ranks:
                return tensors.unchanged(tensor)
            return [part(tensor, rank) for rank in range(self.ranks)]

        def part(tensor: StoredTensor, rank: int) -> MadeTensor:
            rows, *rest = tensor.info.shape
            size = tensor.info.byte_size // self.ranks
            shape = (rows // self.ranks, *rest)
            info = replace(tensor.info, shape=shape, offset=tensor.info.offset + rank * size)

            def chunks() -> Chunks:
                return (chunk.data for chunk in raw_chunks(tensors.checkpoint.folder, info, ring(CHUNK)))

            return MadeTensor(Entry(f"{tensor.on_hub}.rank{rank}", info.dtype, shape, size), chunks, "ROWS")

        return convert
