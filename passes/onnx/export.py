"""*export-onnx*: one block as an ONNX graph with float weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError
from passes.base import Pass
from passes.export.template import BlockSource
from passes.export.weights import WeightBytes
from passes.onnx.graph import add_float, read_trace, weight_values

if TYPE_CHECKING:
    from passes.onnx.graph import Detached

__all__ = ["ExportOnnxPass"]


@dataclass(frozen=True)
class ExportOnnxPass(Pass):
    """A block's graph with its weights stored as `dtype` f32 or f16; it computes in float32.

    The weights stay in the checkpoint until the component is written, and are converted while they are copied. ONNX Runtime
    turns float16 weights into float32 when it loads them: half the size on disk, the speed and memory of float32.
    """

    name = "export-onnx"

    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in {"f32", "f16"}:
            raise BadInputError(f"pass {self.name}: dtype={self.dtype} is unknown: use f32 or f16")

    def __call__(self, source: BlockSource, traces: Path) -> Detached:
        """The block with its weights detached: initializers named after the tensors, and where their bytes lie.

        Args:
            source: the block and its checkpoint.
            traces: the folder that `passes.onnx.trace.trace_kinds` has filled.
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
