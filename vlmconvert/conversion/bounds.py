"""What the weights of a checkpoint must be for a plan: finite, and in the range of float16 where they are stored so."""

from __future__ import annotations

import math

from passes.base import final_bits
from passes.finite import HALF, Bound
from vlmconvert.conversion.plan import Plan
from vlmconvert.families.opened import OpenedModel
from vlmconvert.precisions import precision_options
from vlmconvert.targets.base import ComponentPlan

__all__ = ["weight_bounds"]

_OPTIONS = {"language": "--llm fp32", "vision": "--vision fp32"}


def weight_bounds(plan: Plan, model: OpenedModel) -> dict[str, Bound]:
    """Name in the files -> bound, for every tensor that the plan reads; none if a pass takes weights that are not finite."""
    if any(step.takes_nonfinite for item in plan.components for step in item.steps):
        return {}
    allow = "allow_nonfinite" in {option.name for option in precision_options(plan.target.name)}
    intact = "give an intact checkpoint" + (", or convert this one with --allow-nonfinite" if allow else "")
    halves = {name: item for item in plan.components for name in _in_half(item, model)}
    bounds = {}
    for name, in_file in model.names.items():
        if name in model.unused:
            continue
        half = halves.get(name)
        mend = f"{intact}, or use {_OPTIONS[half.component.side]}" if half else intact
        bounds[in_file] = Bound(model.checkpoint.tensors[in_file], mend, HALF if half else math.inf)
    return bounds


def _in_half(item: ComponentPlan, model: OpenedModel) -> set[str]:
    """In-memory names of the weights that a component stores as float16.

    Beside compressed weights, vectors stay float32.
    """
    bits = {}
    for block in item.component.blocks:
        for name in block.tensors.values():
            shape = model.checkpoint.tensors[model.names[name]].shape
            found = final_bits(item.steps, block.role, name, shape)
            bits[name] = found.bits if found else None
    whole = set(bits.values()) == {16.0}
    return {name for name in bits if (item.layers.get(name) == "fp16" if name in item.layers else whole)}
