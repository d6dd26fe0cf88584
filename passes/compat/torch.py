"""Undocumented interfaces and behaviour of torch on which vlmconvert relies."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

__all__ = ["export_onnx", "put_tensor"]


def put_tensor(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter of a module by a tensor, so that a trace can take the tensor as an input.

    Args:
        module: the module, which is changed in place.
        name: name of the parameter, such as `mlp.up_proj.weight`.
        tensor: the tensor; it need not be a `torch.nn.Parameter`.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters.pop(leaf, None)
    owner.__dict__[leaf] = tensor


def export_onnx(
    module: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_axes: tuple[dict[int, Any], ...],
    opset: int,
) -> ir.Model:
    """Export a module as an ONNX graph that is not optimized, with its parameters as inputs named as in the module.

    Args:
        module: the module, which is called with positional arguments.
        examples: example values of the arguments.
        inputs: names of the arguments; in the graph, the parameters that it reads come after them.
        outputs: names of the values that the module returns.
        dynamic_axes: the dynamic axes of each argument.
        opset: version of ONNX's operators.

    Raises:
        torch.onnx.errors.OnnxExporterError: if torch cannot export the module.
    """
    import torch

    # The exporter makes initializers of the parameters, and names them by their paths from the exported module.
    parameters = [f"block.{name}" for name, _ in module.named_parameters()]
    with _quiet_exporter():
        program = torch.onnx.export(
            _positional(module),
            examples,
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=(dynamic_axes,),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    for name in parameters:
        # This comes before any optimizer, which would fold the stand-ins for weights as if they were their values.
        if name in model.graph.initializers:
            weight = model.graph.initializers.pop(name)
            weight.name, weight.const_value = name.removeprefix("block."), None
            model.graph.inputs.append(weight)
    return model


def _positional(module: torch.nn.Module) -> torch.nn.Module:
    """Wrap a module in one that takes positional arguments, whatever the signature of its own `forward`."""
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = module

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.block(*inputs)

    return Block().eval()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's messages and warnings off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
