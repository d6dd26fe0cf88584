"""Following a prompt through the components by the shapes of their ports: nothing is traced or computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import BadInputError
from passes.vocabulary import Component

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = ["follow"]

_DTYPES = {"f32": np.float32, "i64": np.int64, "i32": np.int32, "boolean": np.bool_}


def follow(components: Sequence[Component], config: dict[str, Any], inputs: Mapping[str, np.ndarray]) -> None:
    """Check that what a processor made of a prompt fits the components and the host steps between them.

    The outputs of a component are zeros.

    Args:
        components: in the order of the data flow.
        config: the completed config (see `vlmconvert.families.complete_config`).
        inputs: the inputs of the components and host steps by name.

    Raises:
        BadInputError: if the shape of an input is not that of its port, or a host step refuses what it gets.
    """
    known = dict(inputs)
    for component in components:
        step = component.host_step
        values = known if step is None else {**known, **step(known, config)}
        dims: dict[str, int] = {}
        for port in component.inputs:
            if port.name in values:
                _bind(port, values[port.name].shape, dims)
        if any(name not in values for name in component.reads if name not in component.state):
            continue
        for port in component.outputs:
            shape = [dims.get(dim, -1) if isinstance(dim, str) else dim for dim in port.shape]
            if min(shape) >= 0:
                known[port.name] = np.broadcast_to(np.zeros((), _DTYPES[port.dtype]), shape)


def _bind(port: Port, shape: tuple[int, ...], dims: dict[str, int]) -> None:
    """Compare a shape with that of a port, and keep the sizes of named dimensions in `dims`."""
    fits = len(shape) == len(port.shape)
    for dim, size in zip(port.shape, shape, strict=False):
        fits &= size == (dims.setdefault(dim, size) if isinstance(dim, str) else dim)
    if not fits:
        raise BadInputError(
            f"it makes {port.name} of shape {list(shape)}, and the model of config.json takes {list(port.shape)}"
        )
