"""The order in which the components of a model run on each other's outputs, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from passes.vocabulary import Component

__all__ = ["run_components"]

V = TypeVar("V")


def run_components(
    components: tuple[Component, ...],
    values: Mapping[str, V],
    prepare: Callable[[Component, Mapping[str, V]], Mapping[str, V]],
    compute: Callable[[Component, dict[str, V]], Mapping[str, V]],
) -> dict[str, V]:
    """Run every component that is needed and has its inputs.

    A component is skipped if the outputs of it that later components read are known already, or if one of its inputs is
    missing, such as the pixel values for a prompt without an image.

    Args:
        components: in the order of the data flow.
        values: the inputs of the components by name.
        prepare: runs a component's host step on all values, and returns the step's outputs by name.
        compute: runs a component on its inputs, and returns its outputs by name.

    Returns:
        The given values and the outputs of all components that ran.
    """
    known = dict(values)
    for number, component in enumerate(components):
        later = components[number + 1 :]
        taken = {name for part in later for name in (*part.reads, *(part.host_step.inputs if part.host_step else ()))}
        outputs = [port.name for port in component.outputs]
        if later and all(name in known for name in outputs if name in taken):
            continue
        prepared = {**known, **prepare(component, known)} if component.host_step else known
        names = [name for name in component.reads if name not in component.state]
        if all(name in prepared for name in names):
            known |= compute(component, {name: prepared[name] for name in names})
    return known
