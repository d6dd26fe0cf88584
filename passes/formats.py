"""The formats that single layers may have, whatever the precision of their component."""

from __future__ import annotations

from math import prod
from types import MappingProxyType

__all__ = ["FLOAT", "GROUPS", "INT8", "VECTOR_BITS", "stored_bits"]

# Format in 4 bit -> number of input channels that share a scale.
GROUPS = MappingProxyType({"int4-g128": 128, "int4-g64": 64, "int4-g32": 32})
# 8 bit with a scale and a zero point for each row; and the checkpoint's values in float16.
INT8, FLOAT = "int8", "fp16"
# Vectors beside compressed weights stay float32.
VECTOR_BITS = 32
_SCALE, _POINT_8, _POINT_4 = 16, 8, 4


def stored_bits(layer_format: str, shape: tuple[int, ...], symmetric: bool = False) -> float:
    """Bits per value of a weight [rows, ...], its share of scales and zero points included.

    Args:
        layer_format: a key of `GROUPS`, `INT8` or `FLOAT`.
        shape: shape of the weight.
        symmetric: whether 4-bit weights have no zero points.
    """
    if layer_format == FLOAT:
        return 16.0
    if layer_format == INT8:
        return 8 + (_SCALE + _POINT_8) / prod(shape[1:])
    return 4 + (_SCALE + (0 if symmetric else _POINT_4)) / GROUPS[layer_format]
