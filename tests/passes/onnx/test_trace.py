from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from manifests.model import Port
from passes.onnx.trace import trace_kinds
from passes.vocabulary import Component, Kind

pytestmark = pytest.mark.slow


def component_of(*kinds: Kind) -> Component:
    return Component("part", "language", "part", {kind.name: kind for kind in kinds}, (), (), ())


def test_equal_kinds_give_equal_files(traced, tmp_path):
    """Whatever was traced before in the process, and nothing of the machine it was traced on."""
    kinds = traced.components["language_model"].kinds
    trace_kinds(traced.model.config, (component_of(kinds["lm_head"]),), tmp_path)
    again = (tmp_path / "lm_head.onnx").read_bytes()
    assert again == (traced.traces / "lm_head.onnx").read_bytes()
    here = str(Path(__file__).parents[3]).encode()
    assert not any(here in path.read_bytes() for path in traced.traces.iterdir())


def test_traces_hold_no_weight(traced):
    for kind, block in traced.kinds().values():
        graph = ir.load(traced.traces / f"{kind.name}.onnx").graph
        ports = [port.name for port in kind.inputs]
        assert [value.name for value in graph.inputs][: len(ports)] == ports
        assert {value.name for value in graph.inputs[len(ports) :]} == set(block.tensors)
        assert sum(value.const_value.nbytes for value in graph.initializers.values()) < 2048


def test_keys_and_values_are_not_repeated_over_query_heads(traced):
    for kind in ("self_attention_layer", "cross_attention_layer"):
        operations = {node.op_type for node in ir.load(traced.traces / f"{kind}.onnx").graph}
        assert "Softmax" in operations
        assert "Expand" not in operations


def test_an_output_may_be_an_input(tmp_path):
    x = Port(name="x", dtype="f32", shape=["batch", 4])
    kind = Kind("same", f"{__name__}:passing", (x,), (x, x.model_copy(update={"name": "y"})), {"batch": 2})
    trace_kinds({}, (component_of(kind),), tmp_path)
    outputs = ir.load(tmp_path / "same.onnx").graph.outputs
    assert [value.name for value in outputs] == ["x.out", "y.out"]
    assert all(value.producer() is not None for value in outputs)


def passing(_config):
    import torch

    class Passing(torch.nn.Module):
        def forward(self, x):
            return x, x

    return Passing()


def test_a_kind_that_torch_cannot_export_is_named(tmp_path):
    from manifests.errors import ConversionError

    x = Port(name="x", dtype="f32", shape=["batch", 4])
    kind = Kind("branch", f"{__name__}:branching", (x,), (x,), {"batch": 2})
    with pytest.raises(ConversionError, match="cannot export branch to ONNX"):
        trace_kinds({}, (component_of(kind),), tmp_path)


def branching(_config):
    import torch

    class Branching(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    return Branching()
