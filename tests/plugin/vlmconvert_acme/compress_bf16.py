"""*compress-bf16*: the weights of a block in bfloat16, as most checkpoints have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from passes.base import WeightBits
from passes.block_pass import BlockPass
from passes.export.ir import BLOCK_FILE, DECOMPRESSION
from passes.export.template import BlockSource

__all__ = ["CompressBf16Pass"]


@dataclass(frozen=True)
class CompressBf16Pass(BlockPass):
    """Matrices in bfloat16, which a runtime turns into float32 before it computes; vectors stay float32."""

    name = "compress-bf16"

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits:
        return WeightBits(16 if len(shape) > 1 else 32)

    def run(self, source: BlockSource, output: Path) -> None:
        import numpy as np
        import openvino as ov
        from openvino import opset13

        model = source.model()
        weights = set(source.block.tensors.values())
        for node in model.get_ordered_ops():
            name = node.get_friendly_name()
            if name not in weights or len(node.get_output_shape(0)) < 2:
                continue
            bits = node.get_data().view(np.uint32)
            rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            stored = ov.op.Constant(ov.Tensor(rounded, rounded.shape, ov.Type.bf16), shared_memory=False)
            stored.set_friendly_name(name)
            targets = node.output(0).get_target_inputs()
            converted = opset13.convert(stored, "f32", name=f"{name}{DECOMPRESSION}")
            for target in targets:
                target.replace_source_output(converted.output(0))
        ov.save_model(model, output / BLOCK_FILE, compress_to_fp16=False)
