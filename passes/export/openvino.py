"""*export-openvino*: one block as OpenVINO IR with float weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError
from passes.base import Pass
from passes.export.ir import DECOMPRESSION
from passes.export.template import BlockSource
from passes.export.weights import WeightBytes

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["BLOCK_FILE", "ExportOpenvinoPass", "save_block"]

BLOCK_FILE = "block.xml"


@dataclass(frozen=True)
class ExportOpenvinoPass(Pass):
    """A block's graph with its weights stored as `dtype` f32 or f16; it computes in float32.

    The weights stay in the checkpoint until the component is written, and are converted while they are copied.
    """

    name = "export-openvino"

    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in {"f32", "f16"}:
            raise BadInputError(f"pass {self.name}: dtype={self.dtype} is unknown: use f32 or f16")

    def __call__(self, source: BlockSource) -> tuple[ov.Model, dict[str, WeightBytes]]:
        """The block with its weights detached: inputs named after the tensors, and where their bytes lie."""
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
    """Write a compressed block's IR; what is still float is stored as float16.

    A block without weights keeps float32: its constants are frequencies and positions, which half precision would spoil.
    """
    import openvino as ov

    ov.save_model(model, output / BLOCK_FILE, compress_to_fp16=bool(source.block.tensors))
