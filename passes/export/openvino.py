"""*export-openvino*: one block as OpenVINO IR with float weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError
from passes.base import BlockPass
from passes.export.template import BlockSource

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["BLOCK_FILE", "ExportOpenvinoPass", "save_block"]

BLOCK_FILE = "block.xml"


@dataclass(frozen=True)
class ExportOpenvinoPass(BlockPass):
    """Fill the block's template with the checkpoint's weights, stored as `dtype` f32 or f16; it computes in float32."""

    name = "export-openvino"

    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in {"f32", "f16"}:
            raise BadInputError(f"pass {self.name}: dtype={self.dtype} is unknown: use f32 or f16")

    def run(self, source: BlockSource, output: Path) -> None:
        save_block(source.model(), source, output, self.dtype)


def save_block(model: ov.Model, source: BlockSource, output: Path, dtype: str) -> None:
    """Write a block's IR, its float constants as `dtype`.

    A block without weights keeps float32: its constants are frequencies and positions, which half precision would spoil.
    """
    import openvino as ov

    ov.save_model(model, output / BLOCK_FILE, compress_to_fp16=dtype == "f16" and bool(source.block.tensors))
