"""Verifying the inputs, outputs, state and weights of a finished OpenVINO graph against its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.model import ComponentRecord, Port
from manifests.verify import Finding, failed, passed
from passes.export.ir import count_weights

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["verify_graph"]


def verify_graph(component: ComponentRecord, xml: Path) -> Iterator[Finding]:
    """Compare the inputs, outputs, state variables, weights and logits of one graph with the manifest."""
    import openvino as ov

    place = f"{component.name}, {xml.name}"
    try:
        model = ov.Core().read_model(xml)
    except RuntimeError as error:
        yield failed("graph", place, f"OpenVINO cannot read it: {_first_line(error)}")
        return
    for title, expected, actual in (
        ("inputs", component.inputs, model.inputs),
        ("outputs", component.outputs, model.outputs),
    ):
        findings = list(_ports(expected, actual))
        yield from [failed(title, place, text) for text in findings] or [passed(title, place, f"{len(actual)}")]
    variables = (node.get_variable_id() for node in model.get_ops() if node.get_type_name() == "ReadValue")
    yield _equal("state", place, component.state, sorted(variables))
    yield _equal("weights", place, component.weights, count_weights(xml))
    logits = [output.partial_shape[1] for output in model.outputs if "logits" in output.get_names()]
    positions = ("last" if logits[0].is_static else "all") if logits else None
    yield _equal("logits", place, component.logits, positions)


def _ports(expected: list[Port], actual: list[ov.Output]) -> Iterator[str]:
    if len(expected) != len(actual):
        yield f"{len(actual)}, the manifest says {len(expected)}"
    for port, output in zip(expected, actual, strict=False):
        names = output.get_names()
        if port.name not in names:
            yield f"{', '.join(sorted(names))}, the manifest says {port.name}"
        dtype = output.element_type.get_type_name()
        if dtype != port.dtype:
            yield f"{port.name} is {dtype}, the manifest says {port.dtype}"
        shape = output.partial_shape
        sizes = [size.get_length() if size.is_static else None for size in shape]
        if sizes != [size if isinstance(size, int) and size >= 0 else None for size in port.shape]:
            yield f"{port.name} has shape {shape}, the manifest says {port.shape}"


def _equal(title: str, place: str, expected: object, actual: object) -> Finding:
    if expected != actual:
        return failed(title, place, f"{actual}, the manifest says {expected}")
    return passed(title, place, str(len(expected)) if isinstance(expected, list) else str(expected))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
