"""*stitch-onnx*: the blocks of a component joined to one ONNX graph by the names of their values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from manifests.model import Port
from passes.base import Context, Form, Intermediate, TransformPass, named_failure
from passes.export.names import block_names, tensor_name
from passes.export.weights import WeightBytes
from passes.onnx.graph import MICROSOFT, OnnxBlocks, OnnxGraph
from passes.onnx.trace import IR_VERSION, OPSET
from passes.store import digest
from passes.vocabulary import Block, Component

if TYPE_CHECKING:
    import onnx_ir as ir

    from passes.onnx.graph import Detached

__all__ = ["StitchOnnxPass", "value_name"]

_DTYPES = {"f32": "FLOAT", "i64": "INT64", "i32": "INT32", "boolean": "BOOL"}


@dataclass(frozen=True)
class StitchOnnxPass(TransformPass):
    """Join blocks: an input of a block is the last value of its name that an earlier block makes, or else a graph input.

    The graph's outputs are the component's, followed by the new values of its state, which the caller feeds back. Nodes,
    values and weights are named after their block, so that the block can be cut out of the finished artifact.
    """

    name = "stitch-onnx"
    takes = (Form.ONNX_BLOCKS,)

    @property
    def makes(self) -> Form:
        return Form.ONNX_GRAPH

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, OnnxBlocks)
        component = before.component

        def build() -> Detached:
            with named_failure(self, component.name):
                return self.join(component, map(before.detached, range(len(component.blocks))))

        return OnnxGraph(component, digest("stitch-onnx", self.version, before.key), before, build)

    def join(self, component: Component, blocks: Iterable[Detached]) -> Detached:
        """Stitch one component.

        Args:
            component: describes the inputs and outputs of the graph.
            blocks: every block in order, with its weights detached (see `passes.onnx.graph`).

        Returns:
            The graph with its weights detached, and the places of their bytes.

        Raises:
            ConversionError: if a block reads a value that neither a block nor the graph's inputs provide.
        """
        import onnx_ir as ir

        inputs: dict[str, ir.Value] = {}
        values: dict[str, ir.Value] = {}
        nodes: list[ir.Node] = []
        initializers: list[ir.Value] = []
        weights: dict[str, WeightBytes] = {}
        ports = {port.name: port for port in (*component.inputs, *component.outputs)}
        for block, (model, block_weights) in zip(component.blocks, blocks, strict=True):
            kind = component.kinds[block.kind]
            weights |= block_weights
            graph = model.graph
            for value, port in zip(list(graph.inputs), kind.inputs, strict=True):
                name = block.inputs[port.name]
                if name not in values:
                    ports.setdefault(name, port)
                    inputs[name] = values[name] = _graph_value(ports[name], name)
                value.replace_all_uses_with(values[name])
            made = list(graph.outputs)
            graph.outputs.clear()
            _rename(block, graph, block_weights)
            for value, port in zip(made, kind.outputs, strict=True):
                name = block.outputs[port.name]
                ports.setdefault(name, port)
                value.name, value.shape = value_name(component, block, port.name), None
                values[name] = value
            initializers += graph.initializers.values()
            graph.initializers.clear()
            block_nodes = list(graph)
            graph.remove(block_nodes)
            nodes += block_nodes
        order = [port.name for port in component.inputs if port.name in inputs] + list(component.state)
        if missing := inputs.keys() - set(order):
            raise ConversionError(
                f"blocks of the {component.name} read {', '.join(sorted(missing))}, which no block and no input provides"
            )
        outputs = [port.name for port in component.outputs] + list(component.state.values())
        for name in outputs:
            values[name].shape = ir.Shape(ports[name].shape)
        domains = {node.domain for node in nodes}
        stitched = ir.Graph(
            [inputs[name] for name in order],
            [values[name] for name in outputs],
            nodes=nodes,
            initializers=initializers,
            opset_imports={"": OPSET} | ({MICROSOFT: 1} if MICROSOFT in domains else {}),
            name=component.name,
        )
        return ir.Model(stitched, ir_version=IR_VERSION, producer_name="vlmconvert"), weights


def value_name(component: Component, block: Block, port: str) -> str:
    """Name in the graph of the value that a block makes at a port; an output of the graph has the output's own name."""
    value = block.outputs[port]
    return value if value in component.state.values() else tensor_name(component, block, port)


def _graph_value(port: Port, name: str) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=ir.Shape(port.shape), type=ir.TensorType(ir.DataType[_DTYPES[port.dtype]]))


def _rename(block: Block, graph: ir.Graph, weights: dict[str, WeightBytes]) -> None:
    """Make the names in a block's graph unique in the component; names of weights are unique already."""
    rename = block_names(block)
    for node in graph:
        assert node.name is not None
        node.name = rename(node.name)
        for position, value in enumerate(node.outputs):
            value.name = f"{node.name}.{position}"
    for value in list(graph.initializers.values()):
        assert value.name is not None
        if value.name not in weights:
            value.name = rename(value.name)
