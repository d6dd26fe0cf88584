"""The targets: each has one folder, and one line in the registry."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from passes.registry import Registry

if TYPE_CHECKING:
    from vlmconvert.targets.base import Target

__all__ = ["TARGETS", "load_target", "recognize"]

TARGETS = Registry(
    "target",
    "vlmconvert.targets",
    "vlmconvert.targets.base:Target",
    {
        "openvino": "vlmconvert.targets.openvino.target:TARGET",
        "onnx": "vlmconvert.targets.onnx.target:TARGET",
        "ascend": "vlmconvert.targets.ascend.target:TARGET",
    },
)


@cache
def load_target(name: str) -> Target:
    """Load the target of that name.

    Raises:
        BadInputError: if no target has that name, or an installed package registers something else under it.
    """
    target: Target = TARGETS.load(name)
    return target


def recognize(folder: Path) -> Target | None:
    """Find the target in whose format another tool has written a folder; None if no target recognizes the folder."""
    targets = (load_target(name) for name in TARGETS.names)
    return next((target for target in targets if target.recognizes(folder)), None)
