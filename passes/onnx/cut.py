"""Cutting a block out of a finished ONNX graph, to measure it by itself; as `passes.validate.cut` for OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manifests.errors import ConversionError
from passes.chain import Compute
from passes.onnx.file import read
from passes.onnx.session import OnnxSession
from passes.onnx.stitch import value_name
from passes.vocabulary import Block, Component

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxArtifactBlocks", "cut"]

_OUTPUT = ".out"
_ELEMENT_TYPES = {"f32": 1, "i32": 6, "i64": 7, "boolean": 9}


@dataclass(frozen=True)
class OnnxArtifactBlocks:
    """The blocks of a finished artifact.

    Attributes:
        graphs: name of a component -> its .onnx file.
    """

    graphs: Mapping[str, Path]

    def compute(self, component: Component, block: Block) -> Compute:
        """See `passes.chain.BlockModels`."""
        path = self.graphs[component.name]
        session = OnnxSession(cut(path, component, block), path.parent)

        def compute(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name.removesuffix(_OUTPUT): value.numpy() for name, value in session.infer(values).items()}

        return compute


def cut(path: Path, component: Component, block: Block) -> onnx.ModelProto:
    """Cut a block out of an artifact's graph; its weights stay in the .data file.

    Inputs and outputs are in the order of the kind's ports and named after them. Names of outputs end with `.out`, because
    a port such as the hidden states is both input and output.

    Raises:
        ConversionError: if the graph has no value of the name of an input or output of the block.
    """
    from onnx import helper

    model = read(path)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    known = makers.keys() | {item.name for item in graph.input}
    made: dict[str, str] = {}
    for earlier in component.blocks:
        if earlier.name == block.name:
            break
        made |= {value: value_name(component, earlier, port) for port, value in earlier.outputs.items()}
    kind = component.kinds[block.kind]
    sources = {port.name: made.get(block.inputs[port.name], block.inputs[port.name]) for port in kind.inputs}
    results = {port.name: value_name(component, block, port.name) for port in kind.outputs}
    for name in (*sources.values(), *results.values()):
        if name not in known:
            raise ConversionError(f"{path.name} has no value {name}: convert the checkpoint again")
    border = {name: port for port, name in reversed(sources.items())}
    needed: set[str] = set()
    pending = list(results.values())
    while pending:
        name = pending.pop()
        if name in needed or name in border or name not in makers:
            continue
        needed.update(makers[name].output)
        pending += makers[name].input
    nodes = [node for node in graph.node if needed.intersection(node.output)]
    names = border | {name: f"{port}{_OUTPUT}" for port, name in results.items()}
    read_names = {name for node in nodes for name in node.input}
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    part = helper.make_graph(
        nodes,
        f"{component.name}/{block.name}",
        [helper.make_tensor_value_info(port.name, _ELEMENT_TYPES[port.dtype], port.shape) for port in kind.inputs],
        [
            helper.make_tensor_value_info(f"{port.name}{_OUTPUT}", _ELEMENT_TYPES[port.dtype], None)
            for port in kind.outputs
        ],
        [constant for constant in graph.initializer if constant.name in read_names],
    )
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
