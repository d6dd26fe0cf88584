"""Templates: a block's graph traced once per kind, with its weights as named inputs.

Tracing needs torch and a module, but no weights: the parameters are on the meta device, and become inputs of the trace.
Filling a template with the weights of a block of its kind needs no torch, and can be done in any process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from calibration.activations import BlockInputs
from manifests.files import read_json
from passes.architecture import Architecture, config_to_blame, describe_architecture, load_config
from passes.checkpoint import Checkpoint
from passes.compat.torch import put_tensor
from passes.export.ir import check_written
from passes.header import TensorInfo
from passes.vocabulary import Block, Component, Kind, TensorShapes, kinds_of, operation_name

if TYPE_CHECKING:
    import openvino as ov
    from torch import nn

__all__ = ["BlockSource", "Templates", "prepare", "trace"]

VERSION = 3
_CONFIG_FILE, _NAMES_FILE, _SHAPES_FILE = "config.json", "names.json", "shapes.json"
_ARCHITECTURE_FILE = "architecture.json"


@dataclass(frozen=True)
class Templates:
    """A folder with the graph of every kind of block, and with what transformers says about the config."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """The config with every default filled in."""
        return self._read(_CONFIG_FILE)

    @property
    def names(self) -> dict[str, str]:
        """In-memory tensor name -> name in the checkpoint's files."""
        return self._read(_NAMES_FILE)

    @property
    def shapes(self) -> dict[str, TensorShapes]:
        """Kind -> parameter -> shape; the parameters are in the order of the trace's inputs."""
        kinds = self._read(_SHAPES_FILE)
        return {kind: {name: tuple(shape) for name, shape in shapes.items()} for kind, shapes in kinds.items()}

    @property
    def architecture(self) -> Architecture:
        """All names of the model's tensors, for targets that need no graphs."""
        return Architecture.from_json(self.names, self._read(_ARCHITECTURE_FILE))

    def _read(self, file: str) -> Any:
        return read_json(self.folder / file, f"delete {self.folder}")


@dataclass(frozen=True)
class BlockSource:
    """Everything that a block pass needs to make one block; picklable.

    Attributes:
        checkpoint: the checkpoint, which holds the weights.
        templates: the traced kinds of block.
        block: the block, bound to its tensors.
        activations: where to read the block's inputs for each sample; empty for passes that need none.
        layers: tensor (in-memory name) -> the precision that this layer gets instead of the pass's own.
        rows: tensor -> the first and the last (exclusive) of its rows that are used, if not all are.
    """

    checkpoint: Checkpoint
    templates: Templates
    block: Block
    activations: tuple[BlockInputs, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def with_rows(self, tensor: str, first: int, last: int) -> Self:
        """The same block with some rows of one of its weights, such as the embeddings of a part of the vocabulary."""
        return replace(self, rows={tensor: (first, last)})

    def template(self) -> ov.Model:
        """The block's graph with its weights as inputs; other inputs and outputs are named after the kind's ports.

        An operation that reads a weight is named after it (`passes.vocabulary.operation_name`).
        """
        import openvino as ov

        model = ov.Core().read_model(self.templates.folder / f"{self.block.kind}.xml")
        for parameter, tensor in self.weights(model):
            for target in parameter.output(0).get_target_inputs():
                node = target.get_node()
                if node.get_type_name() in {"MatMul", "Gather", "Convolution"}:
                    node.set_friendly_name(operation_name(tensor))
            if tensor in self.rows:
                first, last = self.rows[tensor]
                parameter.set_partial_shape(ov.PartialShape([last - first, *parameter.get_partial_shape()[1:]]))
        model.validate_nodes_and_infer_types()
        return model

    def weights(self, model: ov.Model) -> list[tuple[ov.op.Parameter, str]]:
        """The inputs of a template that stand for weights, each with the in-memory name of its tensor."""
        return [
            (parameter, self.block.tensors[parameter.get_friendly_name()])
            for parameter in model.get_parameters()
            if parameter.get_friendly_name() in self.block.tensors
        ]

    def tensor_info(self, tensor: str) -> TensorInfo:
        """Place of the tensor with this in-memory name."""
        return self.checkpoint.tensors[self.templates.names[tensor]]

    def model(self) -> ov.Model:
        """The block's graph with its weights in memory, as float32 constants named after their tensors."""
        return self.fill(self.template())

    def fill(self, template: ov.Model) -> ov.Model:
        """Put the weights into a graph that `template` has returned; see `model`."""
        import openvino as ov

        names = self.templates.names
        for parameter, tensor in self.weights(template):
            values = self.checkpoint.read(names[tensor], self.rows.get(tensor))
            constant = ov.op.Constant(values, shared_memory=True)
            constant.set_friendly_name(tensor)
            parameter.output(0).replace(constant.output(0))
            template.remove_parameter(parameter)
        template.validate_nodes_and_infer_types()
        return template


def prepare(
    folder: Path, tensor_names: list[str], describe: Callable[[dict[str, Any]], tuple[Component, ...]], output: Path
) -> None:
    """Complete the config, map the tensors' names and find the shapes of every kind; meant for a process of its own.

    Nothing is computed, so a config that does not fit the tensors can be refused before anything is traced.

    Args:
        folder: the checkpoint folder; its weights are not read.
        tensor_names: names of the tensors in the checkpoint's files.
        describe: takes the completed config, and returns the components, such as a family's method; picklable.
        output: an existing empty folder, which becomes `Templates.folder` without traces.

    Raises:
        BadInputError: if transformers refuses the config, or cannot make a model of it.
        ConversionError: if two kinds have the same name, or a block's weights do not fit the parameters of its kind.
    """
    config = load_config(folder)
    with config_to_blame("no components"):
        completed = config.to_dict()
        components = describe(completed)
    shapes: dict[str, TensorShapes] = {}
    for kind in kinds_of(components).values():
        with config_to_blame(f"no {kind.name}"):
            module = kind.make_module(completed)
        shapes[kind.name] = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for component in components:
        component.bound(shapes)
    with config_to_blame("no model"):
        architecture = describe_architecture(config, tensor_names)
    for file, content in (
        (_CONFIG_FILE, completed),
        (_NAMES_FILE, architecture.names),
        (_SHAPES_FILE, shapes),
        (_ARCHITECTURE_FILE, architecture.to_json()),
    ):
        (output / file).write_text(json.dumps(content), encoding="utf-8")


def trace(prepared: Path, describe: Callable[[dict[str, Any]], tuple[Component, ...]], output: Path) -> None:
    """Trace every kind of block; meant for a process of its own.

    Args:
        prepared: the folder into which `prepare` has written.
        describe: see `prepare`.
        output: an existing empty folder, which becomes `Templates.folder`.

    Raises:
        BadInputError: if torch cannot trace a module, for which only the config can be at fault.
    """
    for file in (_CONFIG_FILE, _NAMES_FILE, _SHAPES_FILE, _ARCHITECTURE_FILE):
        shutil.copyfile(prepared / file, output / file)
    config = Templates(output).config
    for kind in kinds_of(describe(config)).values():
        _trace(kind, kind.make_module(config), output)


def _trace(kind: Kind, module: nn.Module, output: Path) -> None:
    """Trace the module of a kind into `<kind>.xml` and `.bin`; its parameters become inputs, and are removed from the module.

    Raises:
        BadInputError: if torch cannot trace the module, for which only the config can be at fault.
    """
    import openvino as ov
    import torch

    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    # A trace needs only shapes, so on the meta device even the largest block takes no memory. Convolutions and buffers with
    # values cannot be traced there: their modules are traced on the CPU, where one expanded zero stands for each weight.
    convolutions = (torch.nn.Conv2d, torch.nn.Conv3d)
    real = not shapes or any(isinstance(part, convolutions) for part in module.modules())
    device = torch.device("cpu" if real else "meta")
    weights = [torch.zeros((), device=device).expand(shape) for shape in shapes.values()]
    dtypes = {"f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "boolean": torch.bool}
    examples = [
        torch.zeros(
            [kind.dims[dim] if isinstance(dim, str) else dim for dim in port.shape],
            dtype=dtypes[port.dtype],
            device=device,
        )
        for port in kind.inputs
    ]

    class Traced(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            for name, tensor in zip(shapes, tensors[: len(shapes)], strict=True):
                put_tensor(module, name, tensor)
            return module(*tensors[len(shapes) :])

    arguments = (*weights, *examples)
    with torch.no_grad(), device:
        with config_to_blame(f"no {kind.name}"):
            traced = torch.jit.trace(Traced(), arguments, check_trace=False)
        model = ov.convert_model(traced, example_input=arguments)
    ports = list(shapes.items())
    ports += [(port.name, [-1 if isinstance(dim, str) else dim for dim in port.shape]) for port in kind.inputs]
    for parameter, (name, shape) in zip(model.get_parameters(), ports, strict=True):
        parameter.set_partial_shape(ov.PartialShape(shape))
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
        if name in shapes:
            _fold_shape(parameter, shape)
    for result, port in zip(model.get_results(), kind.outputs, strict=True):
        # This gives each output a name of its own, even if it is the same tensor as an input or as another output.
        result.input_value(0).add_names({f"{port.name}.out"})
        result.set_friendly_name(port.name)
    model.validate_nodes_and_infer_types()
    ov.save_model(model, output / f"{kind.name}.xml", compress_to_fp16=False)
    check_written(output / f"{kind.name}.xml")


def _fold_shape(weight: ov.op.Parameter, shape: list[int]) -> None:
    """Replace what reads only the shape of a weight: OpenVINO lets reshapes before a product follow that of its weight."""
    from openvino import opset13

    for target in weight.output(0).get_target_inputs():
        node = target.get_node()
        if node.get_type_name() == "ShapeOf":
            constant = opset13.constant(shape, node.get_output_element_type(0))
            node.output(0).replace(constant.output(0))
