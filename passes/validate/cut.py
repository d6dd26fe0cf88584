"""Cutting blocks out of a finished OpenVINO graph, to measure them by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from passes.chain import Compute, openvino_compute
from passes.export.names import tensor_name
from passes.vocabulary import Block, Component

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["ArtifactBlocks"]


@dataclass(frozen=True)
class ArtifactBlocks:
    """The blocks of a finished artifact.

    Attributes:
        graphs: name of a component -> its .xml file.
    """

    graphs: Mapping[str, Path]

    def compute(self, component: Component, block: Block) -> Compute:
        """See `passes.chain.BlockModels`."""
        return openvino_compute(self.model(component, block))

    def model(self, component: Component, block: Block) -> ov.Model:
        """Cut out a block's graph, with inputs and outputs named after the kind's ports; other blocks' weights stay on disk.

        Raises:
            ConversionError: if the graph has no tensor of the name of an input or output of the block.
        """
        import openvino as ov
        from openvino import opset13

        xml = self.graphs[component.name]
        graph = ov.Core().read_model(xml)
        tensors = _named_tensors(graph)

        def tensor(name: str) -> ov.Output:
            if name not in tensors:
                raise ConversionError(f"{xml.name} has no tensor {name}: convert the checkpoint again")
            return tensors[name]

        made: dict[str, str] = {}
        for earlier in component.blocks:
            if earlier.name == block.name:
                break
            made |= {value: tensor_name(component, earlier, port) for port, value in earlier.outputs.items()}
        kind = component.kinds[block.kind]
        results = [
            opset13.result(tensor(tensor_name(component, block, port.name)), name=port.name) for port in kind.outputs
        ]
        parameters = []
        for port in kind.inputs:
            value = block.inputs[port.name]
            source = tensor(made.get(value, value))
            parameter = opset13.parameter(source.get_partial_shape(), source.get_element_type(), name=port.name)
            parameter.output(0).set_names({port.name})
            for target in source.get_target_inputs():
                target.replace_source_output(parameter.output(0))
            parameters.append(parameter)
        return ov.Model(results, parameters, f"{component.name}/{block.name}")


def _named_tensors(graph: ov.Model) -> dict[str, ov.Output]:
    """Every tensor by its names; the name of a state variable stands for its rows after `beam_idx` has picked them."""
    tensors: dict[str, ov.Output] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Result":
            continue
        for output in node.outputs():
            if node.get_type_name() == "ReadValue":
                (rows,) = (target.get_node() for target in output.get_target_inputs())
                tensors |= dict.fromkeys(output.get_names(), rows.output(0))
            else:
                tensors |= dict.fromkeys(output.get_names(), output)
    return tensors
