"""Further precisions."""

from __future__ import annotations

from vlmconvert.options import Option
from vlmconvert.precisions import Precision

__all__ = ["FP16_SCALED"]

FP16_SCALED = Precision(
    name="fp16-scaled",
    sides=("language", "vision"),
    targets=("openvino",),
    export="f16",
    steps=("scale-activations",),
    options=(Option("activations_scale", float, "fp16-scaled: what activations are divided by.  [default: 8.0]"),),
)
