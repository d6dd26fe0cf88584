"""Two precisions: one for a target of vlmconvert, one for the target of this package."""

from __future__ import annotations

from vlmconvert.options import Option
from vlmconvert.precisions import Precision

__all__ = ["BF16", "RANKS"]

BF16 = Precision("bf16", ("language", "vision"), ("openvino",), steps=("compress-bf16",))
RANKS = Precision(
    "ranks",
    ("language",),
    ("tensor-names",),
    steps=("split-rows",),
    options=(Option("ranks", int, "ranks: devices among which the rows of a matrix are divided.  [default: 2]"),),
)
