"""*export-onnx*: one block as an ONNX graph with float weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError
from passes.base import Context, Form, Intermediate, TransformPass, WeightBits, named_failure
from passes.block_pass import SplitBlocks
from passes.export.template import BlockSource
from passes.export.weights import WeightBytes
from passes.onnx.graph import OnnxBlocks, add_float, read_trace, weight_values
from passes.store import digest

if TYPE_CHECKING:
    from passes.onnx.graph import Detached

__all__ = ["ExportOnnxPass"]

_BITS = {"f32": 32.0, "f16": 16.0}


class ExportedOnnxBlocks(OnnxBlocks):
    """Blocks with float weights, which are converted to the pass's dtype while they are copied."""

    def __init__(self, item: ExportOnnxPass, split: SplitBlocks, traces: Path) -> None:
        self.component, self._item, self._split, self._traces = split.component, item, split, traces
        self.key = digest("export", str(item), item.version, split.key, traces.name)

    def detached(self, index: int) -> Detached:
        """See `OnnxBlocks`."""
        source = self._split.source(index)
        with named_failure(self._item, self.component.name, source.block.name):
            return self._item.export(source, self._traces)


@dataclass(frozen=True)
class ExportOnnxPass(TransformPass):
    """A block's graph with its weights stored as `dtype` f32 or f16; the graph computes in float32.

    The weights stay in the checkpoint until the component is written, and are converted while they are copied. ONNX Runtime
    turns float16 weights into float32 when it loads them, so they halve the size on disk, but not time or memory.
    """

    name = "export-onnx"
    takes = (Form.SPLIT,)

    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in {"f32", "f16"}:
            raise BadInputError(f"pass {self.name}: dtype={self.dtype} is unknown: use f32 or f16")

    @property
    def makes(self) -> Form:
        return Form.ONNX_BLOCKS

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits | None:
        return WeightBits(_BITS[self.dtype])

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, SplitBlocks)
        return ExportedOnnxBlocks(self, before, context.onnx_traces)

    def export(self, source: BlockSource, traces: Path) -> Detached:
        """The block's graph with initializers, named after the tensors, for its weights; and the places of their bytes.

        Args:
            source: the block and its checkpoint.
            traces: the folder into which `passes.onnx.trace.trace_kinds` has written.
        """
        model = read_trace(traces, source.block)
        weights: dict[str, WeightBytes] = {}
        for value, tensor in weight_values(model, source.block):
            info = source.tensor_info(tensor)
            place = WeightBytes(
                source.checkpoint.folder / info.file, info.offset, info.byte_size, info.dtype, self.dtype.upper()
            )
            model.graph.inputs.remove(value)
            value.replace_all_uses_with(add_float(model, weights, tensor, info.shape, place))
        return model, weights
