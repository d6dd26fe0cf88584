"""*export-openvino*: one block as OpenVINO IR with float weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError
from passes.base import Context, Form, Intermediate, TransformPass, WeightBits, named_failure
from passes.block_pass import FloatBlocks, SplitBlocks
from passes.export.ir import BLOCK_FILE, DECOMPRESSION, check_written, store_in_half
from passes.export.template import BlockSource
from passes.export.weights import WeightBytes
from passes.store import digest

if TYPE_CHECKING:
    import openvino as ov

    from passes.export.ir import Detached

__all__ = ["ExportOpenvinoPass", "ExportedBlocks", "save_block"]

_BITS = {"f32": 32.0, "f16": 16.0}


class ExportedBlocks(FloatBlocks):
    """Blocks with float weights, which are converted to the pass's dtype while they are copied."""

    def __init__(self, item: ExportOpenvinoPass, split: SplitBlocks) -> None:
        self.split, self.component, self._item = split, split.component, item
        self.key = digest("export", str(item), item.version, split.key)
        self.exact = item.dtype == "f32"

    def detached(self, index: int) -> Detached:
        """See `passes.block_pass.Blocks`."""
        source = self.split.source(index)
        with named_failure(self._item, self.component.name, source.block.name):
            return self._item.export(source)


@dataclass(frozen=True)
class ExportOpenvinoPass(TransformPass):
    """A block's graph with its weights stored as `dtype` f32 or f16; the graph computes in float32.

    The weights stay in the checkpoint until the component is written, and are converted while they are copied.
    """

    name = "export-openvino"
    takes = (Form.SPLIT,)

    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in {"f32", "f16"}:
            raise BadInputError(f"pass {self.name}: dtype={self.dtype} is unknown: use f32 or f16")

    @property
    def makes(self) -> Form:
        return Form.F32_BLOCKS if self.dtype == "f32" else Form.F16_BLOCKS

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits:
        return WeightBits(_BITS[self.dtype])

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, SplitBlocks)
        return ExportedBlocks(self, before)

    def export(self, source: BlockSource) -> Detached:
        """The block's graph with inputs, named after the tensors, in place of weights; and the places of their bytes."""
        import openvino as ov
        from openvino import opset13

        model = source.template()
        weights = {}
        for parameter, tensor in source.weights(model):
            info = source.tensor_info(tensor)
            parameter.set_friendly_name(tensor)
            if self.dtype == "f16":
                targets = parameter.output(0).get_target_inputs()
                parameter.set_element_type(ov.Type.f16)
                convert = opset13.convert(parameter, "f32", name=f"{tensor}{DECOMPRESSION}")
                for target in targets:
                    target.replace_source_output(convert.output(0))
            weights[tensor] = WeightBytes(
                source.checkpoint.folder / info.file,
                info.offset,
                info.byte_size,
                info.dtype,
                {"f32": "F32", "f16": "F16"}[self.dtype],
            )
        model.validate_nodes_and_infer_types()
        return model, weights


def save_block(model: ov.Model, source: BlockSource, output: Path) -> None:
    """Write the IR of a compressed block, with float16 weights for layers that the recipe leaves float.

    If no layer is compressed, all weights are stored as float16. A block without weights keeps float32, because its constants
    are frequencies and positions, for which half precision is not exact enough.
    """
    import openvino as ov

    _check_scales(model, source)
    floats = [tensor for tensor, precision in source.layers.items() if precision == "fp16"]
    store_in_half(model, floats)
    # `save_model` does not change graphs that hold compressed weights already.
    ov.save_model(model, output / BLOCK_FILE, compress_to_fp16=bool(source.block.tensors) and not floats)
    check_written(output / BLOCK_FILE)


def _check_scales(model: ov.Model, source: BlockSource) -> None:
    """Refuse a compressed block with a scale that is not finite, because its weight is too large for a scale in float16.

    Raises:
        BadInputError: with the name of the weight.
    """
    import numpy as np

    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "f16":
            if np.isfinite(node.data).all():
                continue
            name = node.get_friendly_name()
            tensor = next((own for own in source.block.tensors.values() if name.startswith(own)), name)
            raise BadInputError(
                f"{source.checkpoint.folder}: tensor {tensor} is too large for this precision, whose scales are float16: use "
                "--llm fp32 or --vision fp32"
            )
