"""Templates: a block's graph traced once per kind, with its weights as named inputs.

Tracing takes torch and a module, but no weight: the parameters live on the meta device and enter the trace as inputs.
A template is filled with the weights of any block of its kind, in any process, without torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.activations import BlockInputs
from manifests.errors import BadInputError, VlmConvertError
from passes.checkpoint import Checkpoint, TensorInfo
from passes.split import Block, Component, Kind, TensorShapes

if TYPE_CHECKING:
    import openvino as ov
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["BlockSource", "Templates", "empty_model", "in_memory_names", "load_config", "prepare"]

VERSION = 1
_CONFIG_FILE, _NAMES_FILE, _SHAPES_FILE = "config.json", "names.json", "shapes.json"


@dataclass(frozen=True)
class Templates:
    """A folder with the traced kinds of one config, the config as transformers completes it, and the tensor names."""

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
        """Kind -> parameter -> shape."""
        kinds = self._read(_SHAPES_FILE)
        return {kind: {name: tuple(shape) for name, shape in shapes.items()} for kind, shapes in kinds.items()}

    def _read(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class BlockSource:
    """Everything that a block pass needs to make one block; picklable.

    `activations` says where the inputs of each sample lie; empty for passes that need none. `in_8_bit` are tensors that a
    pass to 4 bit leaves in 8 bit.
    """

    checkpoint: Checkpoint
    templates: Templates
    block: Block
    activations: tuple[BlockInputs, ...] = ()
    in_8_bit: frozenset[str] = frozenset()

    def template(self) -> ov.Model:
        """The block's graph: inputs and outputs are named after the kind's ports, weights are inputs too.

        The operations that read weights are called after the checkpoint's tensors (in-memory spelling).
        """
        import openvino as ov

        model = ov.Core().read_model(self.templates.folder / f"{self.block.kind}.xml")
        for parameter, tensor in self.weights(model):
            for target in parameter.output(0).get_target_inputs():
                node = target.get_node()
                if node.get_type_name() in {"MatMul", "Gather", "Convolution"}:
                    node.set_friendly_name(tensor.removesuffix(".weight"))
        return model

    def weights(self, model: ov.Model) -> list[tuple[ov.op.Parameter, str]]:
        """The inputs of a template that stand for weights, with the tensors' names."""
        return [
            (parameter, self.block.tensors[parameter.get_friendly_name()])
            for parameter in model.get_parameters()
            if parameter.get_friendly_name() in self.block.tensors
        ]

    def tensor_info(self, tensor: str) -> TensorInfo:
        """Where a tensor lies, by its in-memory name."""
        return self.checkpoint.tensors[self.templates.names[tensor]]

    def model(self) -> ov.Model:
        """The block with its weights in memory, as float32 constants named after the tensors."""
        import openvino as ov

        model = self.template()
        names = self.templates.names
        for parameter, tensor in self.weights(model):
            constant = ov.op.Constant(self.checkpoint.read(names[tensor]), shared_memory=True)
            constant.set_friendly_name(tensor)
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
        model.validate_nodes_and_infer_types()
        return model


def prepare(folder: Path, tensor_names: list[str], describe: str, output: Path) -> None:
    """Complete the config, map the tensor names and trace every kind of block; meant for a process of its own.

    Args:
        folder: the checkpoint folder; its weights are not read.
        tensor_names: names in the files.
        describe: `package.module:function` that makes components of the completed config.
        output: an existing empty folder, to become `Templates.folder`.

    Raises:
        BadInputError: if transformers refuses the config, or no model can be made by it.
    """
    config = load_config(folder)
    completed = config.to_dict()
    with _config_to_blame("no components"):
        components: tuple[Component, ...] = _load(describe)(completed)
    shapes: dict[str, dict[str, list[int]]] = {}
    for component in components:
        for kind in component.kinds.values():
            shapes[kind.name] = _trace(kind, completed, output)
    names = in_memory_names(empty_model(config), tensor_names)
    for file, content in ((_CONFIG_FILE, completed), (_NAMES_FILE, names), (_SHAPES_FILE, shapes)):
        (output / file).write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def _config_to_blame(what: str) -> Iterator[None]:
    """Turn what goes wrong inside into a `BadInputError`: no weight is read there, so only the config makes a difference.

    The original error stays its cause, which --debug shows.
    """
    try:
        yield
    except (VlmConvertError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInputError(
            f"config.json describes {what} that can be made ({type(error).__name__}: {reason}): mend the config"
        ) from error


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder as transformers completes it.

    Raises:
        BadInputError: if transformers refuses it.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadInputError(f"transformers refuses {folder / 'config.json'}: {reason}; mend the config") from error
    config.name_or_path = ""  # where the folder lies is nothing that a result may depend on
    return config


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The class that transformers has for a config, its weights on the meta device.

    Raises:
        BadInputError: if transformers cannot make it.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with _config_to_blame("no model"), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def in_memory_names(model: PreTrainedModel, tensor_names: Iterable[str]) -> dict[str, str]:
    """In-memory name -> name in the files, by transformers' own mapping; names already in memory spelling stay.

    Raises:
        BadInputError: if two names stand for one weight.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    expected = model.state_dict()
    names: dict[str, str] = {}
    for name in tensor_names:
        target, _ = rename_source_key(name, renamings, [], model.base_model_prefix, expected)
        if target in names:
            raise BadInputError(
                f"tensors {names[target]} and {name} are one and the same weight {target}: keep one of them"
            )
        names[target] = name
    return names


def _trace(kind: Kind, config: dict[str, Any], output: Path) -> dict[str, list[int]]:
    """Trace one kind into `<kind>.xml/.bin`; returns its parameters' shapes.

    Raises:
        BadInputError: if torch cannot make or trace it by this config.
    """
    import openvino as ov
    import torch

    to_blame = partial(_config_to_blame, f"no {kind.name}")
    with to_blame():
        module = _load(kind.module)(config, **kind.options).eval()
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    # A trace needs shapes, not values: on the meta device even the largest block takes no memory. It cannot trace
    # convolutions or buffers that hold values; there, one zero stands for the whole weight.
    real = not shapes or any(isinstance(part, torch.nn.Conv2d) for part in module.modules())
    device = torch.device("cpu" if real else "meta")
    weights = [torch.zeros((), device=device).expand(shape) for shape in shapes.values()]
    dtypes = {"f32": torch.float32, "i64": torch.int64, "i32": torch.int32}
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
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                owner._parameters.pop(leaf, None)
                owner.__dict__[leaf] = tensor
            return module(*tensors[len(shapes) :])

    arguments = (*weights, *examples)
    with torch.no_grad(), device:
        with to_blame():
            traced = torch.jit.trace(Traced(), arguments, check_trace=False)
        model = ov.convert_model(traced, example_input=arguments)
    ports = list(shapes.items())
    ports += [(port.name, [-1 if isinstance(dim, str) else dim for dim in port.shape]) for port in kind.inputs]
    for parameter, (name, shape) in zip(model.get_parameters(), ports, strict=True):
        parameter.set_partial_shape(ov.PartialShape(shape))
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
    for result, port in zip(model.get_results(), kind.outputs, strict=True):
        # A name of its own, even where an output is the same tensor as an input or as another output.
        result.input_value(0).add_names({f"{port.name}.out"})
        result.set_friendly_name(port.name)
    model.validate_nodes_and_infer_types()
    ov.save_model(model, output / f"{kind.name}.xml", compress_to_fp16=False)
    return shapes
