"""Undocumented interfaces and behaviour of OpenVINO on which vlmconvert relies."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xml.etree import ElementTree

    import openvino as ov

__all__ = ["AUTOMATIC_NAME", "keep_half_precision", "make_stateful", "set_runtime_option", "switch_telemetry_off"]

# The automatic name of an operation without a name of its own, such as `Multiply_4711`, maybe after a prefix; the number
# counts all operations of the process. The groups are the text before and after the number: `save_model` calls a constant
# that it stores as float16 `Constant_4711_compressed`.
AUTOMATIC_NAME = re.compile(r"^((?:.*/)?[A-Z][A-Za-z0-9]*)_\d+(_compressed)?$")


def switch_telemetry_off() -> None:
    """Keep OpenVINO and NNCF from sending usage data; to be called before they are imported.

    They use a stub if the telemetry package cannot be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def make_stateful(model: ov.Model, pairs: Mapping[str, str], start: Mapping[str, ov.Output]) -> None:
    """Turn inputs and outputs of a graph into state variables, in place.

    Args:
        model: the graph.
        pairs: name of an input -> name of the output that replaces it in the next call.
        start: name of an input -> its value in the first call.
    """
    from openvino._offline_transformations import apply_make_stateful_transformation

    apply_make_stateful_transformation(model, dict(pairs))
    # The transformation names a variable after its input and its output.
    inputs = {f"{past}{present}": past for past, present in pairs.items()}
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([start[inputs[node.get_variable_id()]]])


def set_runtime_option(model: ov.Model, name: str, value: str) -> None:
    """Write a compile option into a graph; plugins use it unless the user gives them another value."""
    model.set_rt_info(value, ["runtime_options", name])


def keep_half_precision(convert: ElementTree.Element) -> None:
    """Mark a conversion in an IR, so that a plugin keeps the float16 weight that it reads instead of folding both.

    Args:
        convert: the `layer` element of the conversion.
    """
    from xml.etree import ElementTree

    rt_info = ElementTree.SubElement(convert, "rt_info")
    ElementTree.SubElement(rt_info, "attribute", name="decompression", version="0")
