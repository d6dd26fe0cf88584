"""Traces: the ONNX graph of each kind of block, exported once, with its weights as named inputs.

`torch.onnx.export` takes seconds, so it runs once per kind and not once per block. The parameters are on the meta device, so
that even the largest block takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import ConversionError
from manifests.model import Port
from passes.compat.torch import export_onnx
from passes.compat.transformers import attention_replaced
from passes.onnx.graph import take_over
from passes.vocabulary import Component, Kind, kinds_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

__all__ = ["IR_VERSION", "OPSET", "trace_kinds"]

VERSION = 1
# The opset that torch's exporter writes without converting it, and the IR version released with that opset.
OPSET = 18
IR_VERSION = 8


def trace_kinds(config: dict[str, Any], components: tuple[Component, ...], output: Path) -> None:
    """Trace every kind of block into `<kind>.onnx`; meant for a process of its own, since it imports torch.

    The inputs of a trace are the kind's ports, followed by the parameters that the graph reads; its outputs are the kind's
    ports. Nodes and values are numbered within the trace, so that equal kinds give equal files.

    Args:
        config: the config with every default filled in.
        components: the components of the model.
        output: an existing folder.

    Raises:
        ConversionError: if torch cannot export a kind.
    """
    import onnx_ir as ir

    for kind in kinds_of(components).values():
        ir.save(_trace(kind, config), output / f"{kind.name}.onnx")


def _trace(kind: Kind, config: dict[str, Any]) -> ir.Model:
    import onnxscript.optimizer
    import torch

    module = kind.make_module(config)
    parameters = list(module.named_parameters())
    # Buffers with values cannot be on the meta device. Such a module is on the CPU: one expanded zero stands for each weight.
    real = not parameters or any(not buffer.is_meta for buffer in module.buffers())
    device = torch.device("cpu" if real else "meta")
    if real:
        for name, parameter in parameters:
            path, _, leaf = name.rpartition(".")
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module.get_submodule(path), leaf, torch.nn.Parameter(zero, requires_grad=False))
    try:
        with torch.no_grad(), device, attention_replaced(_grouped_attention):
            model = export_onnx(
                module,
                _examples(kind, device),
                [port.name for port in kind.inputs],
                [f"{port.name}.out" for port in kind.outputs],
                tuple(_dynamic_axes(port) for port in kind.inputs),
                OPSET,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ConversionError(f"torch cannot export {kind.name} to ONNX: {error}") from error
    onnxscript.optimizer.optimize(model)
    _divide(model)
    _multiply(model)
    _tidy(model, kind)
    return model


def _examples(kind: Kind, device: torch.device) -> tuple[torch.Tensor, ...]:
    import torch

    dtypes = {"f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "boolean": torch.bool}
    return tuple(
        torch.zeros(
            [kind.dims[dim] if isinstance(dim, str) else dim for dim in port.shape],
            dtype=dtypes[port.dtype],
            device=device,
        )
        for port in kind.inputs
    )


def _dynamic_axes(port: Port) -> dict[int, Any]:
    import torch

    return {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(port.shape) if isinstance(dim, str)}


def _grouped_attention(whole: Callable[..., Any]) -> Callable[..., Any]:
    """Attention for transformers' layers that does not repeat keys and values when several query heads share them.

    ONNX Runtime runs the repetition as a copy of the whole cache, for every layer and token. Here, the query heads that
    share a key-value head are stacked along the sequence instead. With 32 query heads on 8 key-value heads and a cache of
    1024 tokens, the attention of one step takes an eighth of the time; opset 23's Attention takes longer.

    Args:
        whole: the original attention, for cases that this one does not cover; see
            `passes.compat.transformers.attention_replaced`.
    """
    import torch

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = others.get("position_bias") is None and others.get("softcap") is None
        if not plain or (causal if attention_mask is None else attention_mask.dtype == torch.bool):
            return whole(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **others)
        batch, heads, length, width = query.shape
        shared = key.shape[1]
        scale = width**-0.5 if scaling is None else scaling
        scores = torch.matmul((query * scale).reshape(batch, shared, -1, width), key.transpose(2, 3))
        scores = scores.reshape(batch, heads, length, -1)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = torch.softmax(scores, dim=-1).reshape(batch, shared, heads // shared * length, -1)
        output = torch.matmul(weights, value).reshape(batch, heads, length, -1)
        return output.transpose(1, 2), None

    return attention


def _divide(model: ir.Model) -> None:
    """Replace x * (1 / y) by x / y, so that ONNX Runtime recognises an RMS norm and computes it in one operation, not seven."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Reciprocal":
            continue
        for product in node.outputs[0].consumers():
            others = [value for value in product.inputs if value is not node.outputs[0]]
            if product.op_type == "Mul" and len(others) == 1:
                quotient = ir.node("Div", [others[0], node.inputs[0]])
                model.graph.insert_before(product, quotient)
                take_over(product, quotient.outputs[0])
        if not node.outputs[0].uses():
            model.graph.remove(node, safe=True)


def _multiply(model: ir.Model) -> None:
    """Replace Gemm, which torch makes of linear layers of matrices, by the MatMul and Add that it makes of all others."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Gemm":
            continue
        left, right, *bias = node.inputs
        if node.attributes.get_int("transB", 0):
            turned = ir.node("Transpose", [right], {"perm": [1, 0]})
            model.graph.insert_before(node, turned)
            right = turned.outputs[0]
        new = [ir.node("MatMul", [left, right])]
        if bias:
            new.append(ir.node("Add", [new[0].outputs[0], bias[0]]))
        model.graph.insert_before(node, new)
        take_over(node, new[-1].outputs[0])


def _tidy(model: ir.Model, kind: Kind) -> None:
    """Remove from a trace everything that depends on this machine or on what the process did before."""
    import onnx_ir as ir

    graph = model.graph
    if model.functions or set(model.opset_imports) != {""}:
        raise ConversionError(f"{kind.name} needs more than ONNX's own operators: {', '.join(model.opset_imports)}")
    for index, value in enumerate(graph.outputs):
        # Each output gets a value of its own, even if it is the same value as an input or as another output.
        if value.producer() is None or value in graph.outputs[:index]:
            graph.append(ir.node("Identity", [value]))
            graph.outputs[index] = graph[-1].outputs[0]
    constants = dict.fromkeys(value for node in graph for value in node.inputs if value and value.is_initializer())
    graph.initializers.clear()
    for number, value in enumerate(constants):
        value.name = f"constant_{number}"
        graph.initializers.add(value)
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    counts: dict[str, int] = {}
    for node in graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        node.name = f"{node.op_type}_{counts[node.op_type]}"
        node.doc_string = None
        node.metadata_props.clear()
        for position, value in enumerate(node.outputs):
            value.name = f"{node.name}.{position}" if value not in graph.outputs else value.name
            value.shape = None
    for value in (*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)):
        value.metadata_props.clear()
        value.doc_string = None
    for value, port in zip(graph.inputs, kind.inputs, strict=False):  # the others are parameters
        value.shape = ir.Shape(port.shape)
    for value, port in zip(graph.outputs, kind.outputs, strict=True):
        value.name = f"{port.name}.out"
        value.shape = ir.Shape(port.shape)
    graph.name = kind.name
    graph.metadata_props.clear()
    graph.opset_imports[""] = OPSET
    model.metadata_props.clear()
    model.ir_version = IR_VERSION
    model.producer_name = model.producer_version = None
