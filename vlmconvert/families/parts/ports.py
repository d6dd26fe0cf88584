"""Helpers to write the ports of a component."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = ["float_port", "int_port", "renamed"]


def float_port(name: str, *shape: int | str) -> Port:
    """A float32 port."""
    from manifests.model import Port

    return Port(name=name, dtype="f32", shape=list(shape))


def int_port(name: str, *shape: int | str, dtype: str = "i64") -> Port:
    """An integer port."""
    from manifests.model import Port

    return Port(name=name, dtype=dtype, shape=list(shape))


def renamed(port: Port, name: str) -> Port:
    """A copy of a port with another name."""
    return port.model_copy(update={"name": name})
