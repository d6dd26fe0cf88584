from __future__ import annotations

import openvino as ov
import torch
from torch import nn

from passes.compat.torch import export_onnx, put_tensor


class Norm(nn.Module):
    """An RMS norm as transformers writes it, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.linear = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)))


def test_a_tensor_takes_the_place_of_a_parameter():
    module = Norm()
    weight = torch.randn(8, 16)
    put_tensor(module, "linear.weight", weight)
    x = torch.randn(2, 3, 16)
    assert torch.equal(
        module(x), nn.functional.linear(nn.functional.rms_norm(x, [16], eps=1e-5), weight, module.linear.bias)
    ), "torch modules no longer keep parameters in _parameters: no block could be traced without its weights"
    assert set(dict(module.named_parameters())) == {"weight", "linear.bias"}


def test_layers_read_their_weights_in_openvino_as_they_are():
    """A layer is called after the weight that it reads, so nothing may stand between them."""
    module = Norm()
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}

    class Traced(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            for name, tensor in zip(shapes, tensors[:-1], strict=True):
                put_tensor(module, name, tensor)
            return module(tensors[-1])

    arguments = (*map(torch.zeros, shapes.values()), torch.zeros(2, 3, 16))
    with torch.no_grad():
        traced = torch.jit.trace(Traced(), arguments, check_trace=False)
    model = ov.convert_model(traced, example_input=arguments)
    assert len(model.get_parameters()) == len(arguments), (
        "the inputs of a traced module are no longer those of its OpenVINO graph"
    )
    readers = [
        target.get_node()
        for target in model.get_parameters()[list(shapes).index("linear.weight")].output(0).get_target_inputs()
    ]
    assert [reader.get_type_name() for reader in readers] == ["MatMul"], (
        f"{readers} stands between a weight and its layer: artifacts would lose the layers' names, and with them overrides, "
        "checks of single blocks, and the ONNX target"
    )


def test_parameters_are_inputs_of_an_onnx_graph(capfd):
    with torch.no_grad(), torch.device("meta"):
        model = export_onnx(Norm(), (torch.zeros(2, 3, 16),), ["x"], ["y"], ({0: torch.export.Dim.DYNAMIC},), 18)
    names = [value.name for value in model.graph.inputs]
    assert names[0] == "x"
    assert set(names[1:]) == {"weight", "linear.weight", "linear.bias"}, (
        f"torch.onnx calls the initializers of a module's parameters {names[1:]}: ONNX artifacts would get no weights"
    )
    assert not any(size == 16 * 8 for size in (value.const_value.size for value in model.graph.initializers.values()))
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.opset_imports == {"": 18}, "torch.onnx converts the opset: traces would change"
    assert capfd.readouterr().out == "", "torch.onnx writes to the terminal in a new way"


def test_a_reciprocal_root_is_a_reciprocal_in_onnx():
    """`passes.onnx.trace` writes x * (1 / y) as x / y, by which ONNX Runtime recognises an RMS norm."""
    with torch.no_grad(), torch.device("meta"):
        model = export_onnx(Norm(), (torch.zeros(2, 3, 16),), ["x"], ["y"], ({},), 18)
    operations = [node.op_type for node in model.graph]
    assert operations.count("Reciprocal") == operations.count("Sqrt") == 1, (
        f"torch.onnx exports an RMS norm as {operations}: ONNX Runtime would compute it in seven operations"
    )
