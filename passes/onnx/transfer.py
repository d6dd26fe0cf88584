"""*transfer-onnx*: one block as an ONNX graph with the weights that compression has left in its OpenVINO graph.

Codes, scales and zero points are those of the OpenVINO block, so both targets share the compressed blocks in the store, and
what is true of one target's weights is true of the other's. They stay in the block's .bin until the component is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from manifests.errors import ConversionError
from passes.base import Pass
from passes.export.weights import Rows, WeightBytes
from passes.onnx.graph import add_float, add_weight, read_trace, weight_values
from passes.split import Block

if TYPE_CHECKING:
    import onnx_ir as ir

    from passes.onnx.graph import Detached

__all__ = ["TransferOnnxPass"]

MICROSOFT = "com.microsoft"
_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8}
_STORED = {"f32": "F32", "f16": "F16"}
# MatMulNBits knows no scale per row, so the scale of a row stands for each of its blocks; blocks of 128 ran fastest.
_ROW_BLOCK = 128
_LARGEST_BLOCK, _LEAST_BLOCK, _PADDED_BLOCK = 256, 16, 32
# What NNCF's AWQ calls the multiplication that it puts before a layer whose predecessor cannot take the scale in.
_AWQ_MULTIPLY = "/awq_mul"


@dataclass(frozen=True)
class _Constant:
    """A constant of an IR: its dtype, its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    place: WeightBytes

    def converted(self, wanted: str, rows: Rows | None = None, stored: str = "") -> WeightBytes:
        """The bytes in another dtype, in wider rows."""
        place = self.place
        return WeightBytes(place.file, place.offset, place.size, stored or self.dtype.upper(), wanted, rows)


@dataclass(frozen=True)
class _Quantized:
    """The parts of a compressed weight; symmetric ones have no zero points."""

    tensor: str
    codes: _Constant
    scale: _Constant
    zero_point: _Constant | None

    @property
    def bits(self) -> int:
        return _BITS[self.codes.dtype]


@dataclass(frozen=True)
class TransferOnnxPass(Pass):
    """Matrix products become MatMulNBits, table look-ups and convolutions dequantize what they read.

    MatMulNBits takes NNCF's 4-bit codes as they lie in the .bin. For one token and a 2048 x 5632 matrix on one AVX-512 core it
    took 0.2 ms, where float32 took 2.2 ms; blocked DequantizeLinear took as long where ONNX Runtime fuses it into MatMulNBits
    (for transposed codes only) and 26 ms where it does not.

    Attributes:
        accuracy_level: of MatMulNBits. 4 computes with activations in 8 bit per block, four times faster than 0, which
            computes in float32; with 8-bit weights, ONNX Runtime has no fast way but 4.
    """

    name = "transfer-onnx"

    accuracy_level: int = 4

    def __call__(self, block: Block, traces: Path, xml: Path) -> Detached:
        """The block with its weights detached.

        Args:
            block: the block.
            traces: the folder that `passes.onnx.trace.trace_kinds` has filled.
            xml: the compressed block in OpenVINO IR.

        Raises:
            ConversionError: if a weight is missing in the IR, or is read in a way that knows no compression.
        """
        graph = _Graph(xml)
        model = read_trace(traces, block)
        weights: dict[str, WeightBytes] = {}
        for value, tensor in weight_values(model, block):
            constant = graph.constant(tensor)
            model.graph.inputs.remove(value)
            if constant.dtype in _STORED:
                place = constant.converted(constant.dtype.upper())
                value.replace_all_uses_with(add_float(model, weights, tensor, constant.shape, place))
            else:
                quantized = _Quantized(
                    tensor, constant, graph.constant(f"{tensor}/scale"), graph.constants.get(f"{tensor}/zero_point")
                )
                self._connect(model, weights, quantized, value)
        for reader, name, constant in graph.awq_scales():
            _multiply(model, weights, block, reader, name, constant)
        return model, weights

    def _connect(
        self, model: ir.Model, weights: dict[str, WeightBytes], quantized: _Quantized, value: ir.Value
    ) -> None:
        """Let every operation that reads `value` read the compressed weight."""
        readers = value.consumers()
        kinds = {reader.op_type for reader in readers}
        if kinds == {"Transpose"}:
            products = [product for reader in readers for product in reader.outputs[0].consumers()]
            if any(product.op_type != "MatMul" for product in products):
                raise ConversionError(f"{quantized.tensor} is not only a matrix product's weight")
            columns, rows = value.shape[1], value.shape[0]  # type: ignore[index]
            parts, attributes = _blocks(model, weights, quantized, int(columns), int(rows))  # type: ignore[arg-type]
            attributes["accuracy_level"] = self.accuracy_level
            for product in products:
                _replace(model, product, "MatMulNBits", [product.inputs[0], *parts], attributes, MICROSOFT)
            model.graph.remove(readers, safe=True)
        elif kinds == {"Gather"}:
            for reader in readers:
                _look_up(model, weights, quantized, reader)
        else:
            value.replace_all_uses_with(_dequantized(model, weights, quantized))


class _Graph:
    """What a compressed IR says of its constants."""

    def __init__(self, xml: Path) -> None:
        self._xml = xml
        tree = ElementTree.parse(xml)
        self._layers = {layer.attrib["id"]: layer for layer in tree.iterfind("layers/layer")}
        self._edges = [(edge.attrib["from-layer"], edge.attrib["to-layer"]) for edge in tree.iterfind("edges/edge")]
        self.constants: dict[str, _Constant] = {}
        for layer in self._layers.values():
            if layer.attrib["type"] == "Const":
                data = layer.find("data")
                assert data is not None
                values = data.attrib
                self.constants[layer.attrib["name"]] = _Constant(
                    values["element_type"],
                    tuple(int(size) for size in values["shape"].split(",") if size.strip()),
                    WeightBytes(xml.with_suffix(".bin"), int(values["offset"]), int(values["size"])),
                )

    def constant(self, name: str) -> _Constant:
        if name not in self.constants:
            raise ConversionError(f"{self._xml} has no constant {name}: remove it from the store and convert again")
        return self.constants[name]

    def awq_scales(self) -> list[tuple[str, str, _Constant]]:
        """Layers whose input AWQ multiplies: the layer's name, the multiplication's, and its factors."""
        found = []
        for key, layer in self._layers.items():
            name = layer.attrib["name"]
            if not name.endswith(_AWQ_MULTIPLY):
                continue
            (factors,) = [source for source, target in self._edges if target == key and self._is_constant(source)]
            while self._layers[factors].attrib["type"] != "Const":
                (factors,) = [source for source, target in self._edges if target == factors]
            constant = self.constants[self._layers[factors].attrib["name"]]
            found += [
                (self._layers[target].attrib["name"], name, constant) for source, target in self._edges if source == key
            ]
        return found

    def _is_constant(self, key: str) -> bool:
        layer = self._layers[key]
        if layer.attrib["type"] == "Convert":
            return all(self._is_constant(source) for source, target in self._edges if target == key)
        return layer.attrib["type"] == "Const"


def _blocks(
    model: ir.Model, weights: dict[str, WeightBytes], quantized: _Quantized, columns: int, rows: int
) -> tuple[list[ir.Value], dict[str, int]]:
    """Codes, scales and zero points as MatMulNBits takes them, for a weight [rows, columns]; and its attributes."""
    import onnx_ir as ir

    bits, tensor = quantized.bits, quantized.tensor
    scales = _count(quantized.scale.shape) // rows
    if scales > 1:
        block = min(columns // scales, _LARGEST_BLOCK)
    else:
        block = min(columns & -columns, _ROW_BLOCK)
        block = block if block >= _LEAST_BLOCK else _PADDED_BLOCK
    blocks = -(-columns // block)
    repeat = blocks // scales
    wider = Rows(scales, repeat, blocks) if repeat > 1 else None
    padded = Rows(columns, 1, blocks * block) if blocks * block > columns else None
    unsigned = f"U{bits}"
    parts = [
        add_weight(
            model,
            weights,
            tensor,
            ir.DataType.UINT8,
            [rows, blocks, block * bits // 8],
            quantized.codes.converted(unsigned, padded),
        ),
        add_weight(
            model,
            weights,
            f"{tensor}/scale",
            ir.DataType.FLOAT,
            [rows * blocks],
            quantized.scale.converted("F32", wider),
        ),
    ]
    if quantized.zero_point is not None:
        if bits == 4 and blocks % 2:  # two zero points in a byte, every row from a new byte on
            wider = Rows(scales, repeat, blocks + 1)
        parts.append(
            add_weight(
                model,
                weights,
                f"{tensor}/zero_point",
                ir.DataType.UINT8,
                [rows * -(-blocks * bits // 8)],
                quantized.zero_point.converted(unsigned, wider),
            )
        )
    return parts, {"K": columns, "N": rows, "bits": bits, "block_size": block}


def _look_up(model: ir.Model, weights: dict[str, WeightBytes], quantized: _Quantized, reader: ir.Node) -> None:
    """Gather the codes of the wanted rows, their scales and zero points, and dequantize what was gathered."""
    import onnx_ir as ir

    table, indexes = quantized.codes, reader.inputs[1]
    rows = table.shape[0]
    columns = _count(table.shape) // rows
    scales = _count(quantized.scale.shape) // rows
    packed = quantized.bits == 4
    name = reader.name
    assert name is not None
    if reader.attributes.get_int("axis", 0) or (packed and columns % 2):
        raise ConversionError(f"{quantized.tensor}: looking up in {quantized.bits} bit needs whole rows of even length")

    def step(op_type: str, inputs: list[ir.Value | None], part: str, attributes: dict[str, int | str] | None = None) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or {}, name=f"{name}/{part}" if part else name)
        model.graph.insert_before(reader, node)
        return node.outputs[0]

    def gathered(part: str, weight: ir.Value) -> ir.Value:
        return step("Gather", [weight, indexes], f"{part}gather", {"axis": 0})

    def floats(part: str, value: ir.Value) -> ir.Value:
        return step("Cast", [value], f"{part}float", {"to": ir.DataType.FLOAT})

    signed = table.dtype == "i8"
    values = gathered(
        "",
        add_weight(
            model,
            weights,
            quantized.tensor,
            ir.DataType.INT8 if signed else ir.DataType.UINT8,
            [rows, columns // 2 if packed else columns],
            table.place if signed else table.converted(f"U{quantized.bits}"),
        ),
    )
    if packed:
        low = step("BitwiseAnd", [values, _constant(model, f"{name}/15", 15, "u1")], "low")
        high = step("BitShift", [values, _constant(model, f"{name}/4", 4, "u1")], "high", {"direction": "RIGHT"})
        axis = _constant(model, f"{name}/axis", [-1], "i8")
        pair = [step("Unsqueeze", [half, axis], f"{part}_pair") for half, part in ((low, "low"), (high, "high"))]
        values = step("Concat", [*pair], "unpacked", {"axis": -1})
    groups = _constant(model, f"{name}/groups", [0, 0, scales, columns // scales], "i8")
    values = step("Reshape", [floats("", values), groups], "grouped")
    if packed and quantized.zero_point is None:
        values = step("Sub", [values, _constant(model, f"{name}/8", 8, "f4")], "centred")
    elif quantized.zero_point is not None:
        rows_of_points = Rows(scales, 1, scales) if packed else None
        place = quantized.zero_point.converted("U8", rows_of_points)
        points = add_weight(model, weights, f"{quantized.tensor}/zero_point", ir.DataType.UINT8, [rows, scales, 1], place)
        values = step("Sub", [values, floats("zero_point/", gathered("zero_point/", points))], "centred")
    scale = add_weight(
        model,
        weights,
        f"{quantized.tensor}/scale",
        ir.DataType.FLOAT16,
        [rows, scales, 1],
        quantized.scale.place,
    )
    values = step("Mul", [values, floats("scale/", gathered("scale/", scale))], "scaled")
    values = step("Reshape", [values, _constant(model, f"{name}/whole", [0, 0, columns], "i8")], "whole")
    _take_over(reader, values)


def _dequantized(model: ir.Model, weights: dict[str, WeightBytes], quantized: _Quantized) -> ir.Value:
    """A DequantizeLinear over the first axis."""
    import onnx_ir as ir

    tensor, codes = quantized.tensor, quantized.codes
    if quantized.bits != 8 or _count(quantized.scale.shape) != codes.shape[0]:
        raise ConversionError(f"{tensor} is neither a matrix nor a table, and not in 8 bit per row: use int8 or fp16")
    dtype = {"u8": ir.DataType.UINT8, "i8": ir.DataType.INT8}[codes.dtype]
    parts = [
        add_weight(model, weights, tensor, dtype, codes.shape, codes.place),
        add_weight(
            model, weights, f"{tensor}/scale", ir.DataType.FLOAT, codes.shape[:1], quantized.scale.converted("F32")
        ),
    ]
    if quantized.zero_point is not None:
        place = quantized.zero_point.place
        parts.append(add_weight(model, weights, f"{tensor}/zero_point", dtype, codes.shape[:1], place))
    node = ir.node("DequantizeLinear", parts, {"axis": 0}, name=f"{tensor}/float")
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


def _multiply(
    model: ir.Model, weights: dict[str, WeightBytes], block: Block, reader: str, name: str, factors: _Constant
) -> None:
    """Multiply the input of a layer with AWQ's factors."""
    import onnx_ir as ir

    node = next((node for node in model.graph if node.name == reader), None)
    if node is None:
        raise ConversionError(f"AWQ scales the input of {reader}, which block {block.name} does not have")
    name = f"{reader}{_AWQ_MULTIPLY}"
    place = factors.converted(factors.dtype.upper())
    factor = add_float(model, weights, f"{name}/factors", factors.shape, place)
    product = ir.node("Mul", [node.inputs[0], factor], name=name)
    model.graph.insert_before(node, product)
    node.replace_input_with(0, product.outputs[0])


def _replace(
    model: ir.Model, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int], domain: str
) -> None:
    """Put another operation in the place of one with a single output."""
    import onnx_ir as ir

    other = ir.node(op_type, inputs, attributes, domain=domain, name=node.name)
    model.graph.insert_before(node, other)
    _take_over(node, other.outputs[0])


def _take_over(node: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for what `node` makes, and remove the node."""
    made = node.outputs[0]
    value.type, value.shape = made.type, made.shape
    made.replace_all_uses_with(value, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _constant(model: ir.Model, name: str, value: object, dtype: str) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    tensor = ir.tensor(np.array(value, dtype), name=name)
    constant = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(constant)
    return constant


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
