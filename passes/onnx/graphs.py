"""Verifying the inputs, outputs and weights of a finished ONNX graph against its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from manifests.model import ComponentRecord, Port
from manifests.verify import Finding, failed, passed
from passes.onnx.file import check_weights_beside, count_weights, ports

__all__ = ["verify_graph"]


def verify_graph(component: ComponentRecord, path: Path) -> Iterator[Finding]:
    """Check that a graph is valid ONNX, and compare its inputs, outputs, weights and logits with the manifest."""
    import onnx

    place = f"{component.name}, {path.name}"
    try:
        check_weights_beside(path)
        onnx.checker.check_model(path)
        inputs, outputs = ports(path)
    except Exception as error:  # onnx raises what protobuf and its own C++ raise
        yield failed("graph", place, f"it is not valid ONNX: {_first_line(error)}")
        return
    yield passed("graph", place, "valid ONNX")
    for title, expected, actual in (("inputs", component.inputs, inputs), ("outputs", component.outputs, outputs)):
        findings = list(_differences(expected, actual))
        yield from [failed(title, place, text) for text in findings] or [passed(title, place, f"{len(actual)}")]
    logits = [port.shape[1] for port in outputs if port.name == "logits"]
    positions = ("last" if logits[0] == 1 else "all") if logits else None
    for title, claimed, found in (
        ("weights", component.weights, count_weights(path)),
        ("logits", component.logits, positions),
    ):
        if claimed == found:
            yield passed(title, place, str(claimed))
        else:
            yield failed(title, place, f"{found}, the manifest says {claimed}")


def _differences(expected: list[Port], actual: list[Port]) -> Iterator[str]:
    if len(expected) != len(actual):
        yield f"{len(actual)}, the manifest says {len(expected)}"
    for port, other in zip(expected, actual, strict=False):
        if port != other:
            yield f"{other.name} {other.dtype} {other.shape}, the manifest says {port.name} {port.dtype} {port.shape}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
