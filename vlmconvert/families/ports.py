"""Short ways to write the ports and kinds of a family."""

from __future__ import annotations

from manifests.model import Port
from passes.split import Kind

__all__ = ["float_port", "int_port", "kinds_by_name", "renamed"]


def float_port(name: str, *shape: int | str) -> Port:
    """A float32 port."""
    return Port(name=name, dtype="f32", shape=list(shape))


def int_port(name: str, *shape: int | str, dtype: str = "i64") -> Port:
    """An integer port."""
    return Port(name=name, dtype=dtype, shape=list(shape))


def renamed(port: Port, name: str) -> Port:
    """The same port under another name."""
    return port.model_copy(update={"name": name})


def kinds_by_name(*kinds: Kind) -> dict[str, Kind]:
    """Kinds as a component holds them."""
    return {kind.name: kind for kind in kinds}
