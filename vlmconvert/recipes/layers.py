"""Layers that get another precision than their component: finding the tensors that patterns match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from manifests.errors import BadInputError
from passes.base import TransformPass
from passes.vocabulary import Component, TensorShapes

__all__ = ["chosen_layers"]


def chosen_layers(
    component: Component,
    patterns: Mapping[str, str],
    steps: Sequence[TransformPass],
    shapes: Mapping[str, TensorShapes],
) -> dict[str, str]:
    """Find the weights of the layers that patterns match, with the precisions of these layers.

    A pattern may have `*`, `?` and `[...]`. It is compared with the whole name of a layer, and with every part of the
    name that follows a dot: `layers.0.*` matches `model.language_model.layers.0.mlp.up_proj`. Only weights with two or
    more dimensions are layers.

    Args:
        component: the component, bound to the checkpoint's tensors.
        patterns: pattern -> precision; if several patterns match a layer, the last one counts.
        steps: the passes of the component; one of them must support the precision for single layers.
        shapes: kind -> parameter -> shape.

    Returns:
        In-memory name of a weight -> precision of its layer.

    Raises:
        BadInputError: if a pattern matches no layer, or no pass supports the precision for single layers.
    """
    known = {precision for step in steps for precision in step.overrides}
    layers = [
        tensor
        for block in component.blocks
        for parameter, tensor in block.tensors.items()
        if len(shapes[block.kind][parameter]) > 1
    ]
    found: dict[str, str] = {}
    for pattern, precision in patterns.items():
        if precision not in known:
            mend = (
                f"use {' or '.join(sorted(known))}" if known else "leave the pattern out, or add a pass that compresses"
            )
            raise BadInputError(
                f"component {component.name}: no pass can give the layers {pattern!r} the precision {precision}: {mend}"
            )
        matching = [tensor for tensor in layers if _matches(tensor.removesuffix(".weight"), pattern)]
        if not matching:
            examples = ", ".join(tensor.removesuffix(".weight") for tensor in layers[:1])
            raise BadInputError(
                f"component {component.name}: no layer matches {pattern!r}: write a pattern for names such as {examples}"
            )
        found |= dict.fromkeys(matching, precision)
    return found


def _matches(layer: str, pattern: str) -> bool:
    return fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}")
