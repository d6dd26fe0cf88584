"""*transfer-onnx*: one block as an ONNX graph with the weights that compression has left in its OpenVINO graph.

Codes, scales and zero points are those of the OpenVINO graph, so both targets share the compressed blocks in the store, and
what is true of one target's weights is true of the other's. They stay in the .bin until the component is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import ConversionError
from passes.base import Pass
from passes.export.weights import Rows, WeightBytes
from passes.onnx.compressed import Activation, CompressedGraph, Constant, QuantizedWeight
from passes.onnx.graph import (
    MICROSOFT,
    add_constant,
    add_float,
    add_weight,
    read_trace,
    take_over,
    weight_readers,
    weight_values,
)
from passes.split import Block

if TYPE_CHECKING:
    import onnx_ir as ir

    from passes.onnx.graph import Detached

__all__ = ["TransferOnnxPass"]

# MatMulNBits knows no scale for a whole row, so the row's scale stands for each of its blocks; blocks of 128 ran fastest.
_ROW_BLOCK = 128
_LARGEST_BLOCK, _LEAST_BLOCK, _PADDED_BLOCK = 256, 16, 32


@dataclass(frozen=True)
class TransferOnnxPass(Pass):
    """Compressed matrix products become MatMulNBits, or QDQ where activations are quantized too; tables stay compressed.

    MatMulNBits takes NNCF's 4-bit codes as they lie. For one token and a 2048 x 5632 matrix on one core with AVX-512 VNNI it
    takes 0.2 ms, where float32 takes 2.2 ms. Blocked DequantizeLinear is as fast where ONNX Runtime turns it into MatMulNBits
    on loading, for which the codes would have to be transposed, and takes 26 ms where it does not.

    Attributes:
        accuracy_level: of MatMulNBits. 4 computes with activations in 8 bit per block, four times faster than 0, which
            computes in float32; with 8-bit weights, 0 takes 50 ms in the example above.
    """

    name = "transfer-onnx"

    accuracy_level: int = 4

    def __call__(self, block: Block, traces: Path, compressed: CompressedGraph) -> Detached:
        """The block with its weights detached.

        Args:
            block: the block.
            traces: the folder that `passes.onnx.trace.trace_kinds` has filled.
            compressed: the block, or the component that it is part of, after compression.

        Raises:
            ConversionError: if a weight is missing there, or is read in a way that knows no compression.
        """
        model = read_trace(traces, block)
        filling = _Filling(model, {}, self.accuracy_level)
        for value, tensor in weight_values(model, block):
            model.graph.inputs.remove(value)
            weight = compressed.weight(tensor)
            if isinstance(weight, Constant):
                shape = [int(size) for size in value.shape or ()]  # type: ignore[arg-type]
                value.replace_all_uses_with(filling.add_float(tensor, weight, shape))
                continue
            readers = weight_readers(value)
            activations = [compressed.activation(reader.name or "") for reader in readers]
            for reader, activation in zip(readers, activations, strict=True):
                filling.scale_input(reader, activation)
            kinds = {reader.op_type for reader in readers}
            if kinds == {"Gather"}:
                for reader in readers:
                    filling.look_up(tensor, weight, reader)
            elif kinds == {"MatMul"} and not any(item.scale for item in activations):
                filling.multiply(tensor, weight, value, readers)
            else:
                filling.dequantize(tensor, weight, value)
        model.graph.sort()
        return model, filling.weights


@dataclass
class _Filling:
    """A block's graph while its weights are put in."""

    model: ir.Model
    weights: dict[str, WeightBytes]
    accuracy_level: int
    scaled: dict[tuple[Any, Activation], ir.Value] = field(default_factory=dict)

    def add(self, name: str, dtype: str, shape: list[int], place: WeightBytes) -> ir.Value:
        import onnx_ir as ir

        return add_weight(self.model, self.weights, name, ir.DataType[dtype], shape, place)

    def add_float(self, name: str, constant: Constant, shape: list[int]) -> ir.Value:
        place = constant.converted(constant.dtype.upper())
        return add_float(self.model, self.weights, name, shape, place)

    def insert(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes, name=name)
        self.model.graph.insert_before(before, node)
        return node.outputs[0]

    def scale_input(self, reader: ir.Node, activation: Activation) -> None:
        """Do to a layer's input what AWQ, SmoothQuant and the quantization of activations do."""
        import numpy as np

        name, value = reader.name, reader.inputs[0]
        key = (value, activation)
        if key in self.scaled:  # q, k and v share their input
            reader.replace_input_with(0, self.scaled[key])
            return
        if activation.factors is not None:
            factors = self.add_float(f"{name}/factors", activation.factors, list(activation.factors.shape))
            value = self.insert(reader, "Mul", [value, factors], f"{name}/scaled_input")
        if activation.scale:
            parts = [
                add_constant(self.model, f"{name}/input_scale", np.float32(activation.scale)),
                add_constant(self.model, f"{name}/input_zero_point", np.uint8(activation.zero_point)),
            ]
            value = self.insert(reader, "QuantizeLinear", [value, *parts], f"{name}/input_codes")
            value = self.insert(reader, "DequantizeLinear", [value, *parts], f"{name}/input")
        assert value is not None
        self.scaled[key] = value
        reader.replace_input_with(0, value)

    def multiply(self, tensor: str, weight: QuantizedWeight, value: ir.Value, readers: list[ir.Node]) -> None:
        """Put MatMulNBits in the place of the products with a transposed weight [rows, columns]."""
        import onnx_ir as ir

        if any(reader.op_type != "Transpose" for reader in value.consumers()):
            raise ConversionError(f"{tensor} is multiplied without being transposed: use fp16")
        rows, columns = (int(size) for size in value.shape or ())  # type: ignore[arg-type]
        parts, attributes = self._blocks(tensor, weight, rows, columns)
        for reader in readers:
            product = ir.node(
                "MatMulNBits",
                [reader.inputs[0], *parts],
                {**attributes, "accuracy_level": self.accuracy_level},
                domain=MICROSOFT,
                name=reader.name,
            )
            self.model.graph.insert_before(reader, product)
            take_over(reader, product.outputs[0])
        self.model.graph.remove(value.consumers(), safe=True)

    def _blocks(
        self, tensor: str, weight: QuantizedWeight, rows: int, columns: int
    ) -> tuple[list[ir.Value], dict[str, int]]:
        """Codes, scales and zero points as MatMulNBits takes them, and its attributes."""
        bits, groups = weight.bits, weight.groups
        if groups > 1:
            block = min(columns // groups, _LARGEST_BLOCK)
        else:
            block = min(columns & -columns, _ROW_BLOCK)
            block = block if block >= _LEAST_BLOCK else _PADDED_BLOCK
        blocks = -(-columns // block)
        repeat = blocks // groups
        wider = Rows(groups, repeat, blocks) if repeat > 1 else None
        padded = Rows(columns, 1, blocks * block) if blocks * block > columns else None
        codes, scale, points = weight.codes, weight.scale, weight.zero_point
        parts = [
            self.add(tensor, "UINT8", [rows, blocks, block * bits // 8], codes.converted(f"U{bits}", padded)),
            self.add(f"{tensor}/scale", "FLOAT", [rows * blocks], scale.converted("F32", wider)),
        ]
        if points is not None:
            if bits == 4 and blocks % 2:  # two zero points in a byte, every row from a new byte on
                wider = Rows(groups, repeat, blocks + 1)
            place = points.converted(f"U{bits}", wider)
            parts.append(self.add(f"{tensor}/zero_point", "UINT8", [rows * -(-blocks * bits // 8)], place))
        return parts, {"K": columns, "N": rows, "bits": bits, "block_size": block}

    def look_up(self, tensor: str, weight: QuantizedWeight, reader: ir.Node) -> None:
        """Gather codes, scales and zero points of the wanted rows, and dequantize what was gathered."""
        import numpy as np

        codes, points, groups, packed = weight.codes, weight.zero_point, weight.groups, weight.bits == 4
        rows, columns = codes.shape[0], prod(codes.shape[1:])
        name, indexes = reader.name or "", reader.inputs[1]
        if reader.attributes.get_int("axis", 0) or (packed and columns % 2):
            raise ConversionError(f"{tensor} cannot be looked up in {weight.bits} bit: use fp16")

        def step(op_type: str, part: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
            return self.insert(reader, op_type, list(inputs), f"{name}/{part}", **attributes)

        def constant(part: str, value: np.ndarray | np.generic) -> ir.Value:
            return add_constant(self.model, f"{name}/{part}", value)

        if packed:
            values = self.add(tensor, "UINT8", [rows, columns // 2], codes.converted("U4"))
            values = step("Gather", "pairs", values, indexes, axis=0)
            axis = constant("axis", np.array([-1]))
            low = step("BitwiseAnd", "low", values, constant("15", np.uint8(15)))
            high = step("BitShift", "high", values, constant("4", np.uint8(4)), direction="RIGHT")
            halves = [step("Unsqueeze", f"{part}_half", half, axis) for part, half in (("low", low), ("high", high))]
            values = step("Concat", "codes", *halves, axis=-1)
        else:
            dtype = {"u8": "UINT8", "i8": "INT8"}[codes.dtype]
            values = step("Gather", "codes", self.add(tensor, dtype, [rows, columns], codes.place), indexes, axis=0)
        values = step("Cast", "floats", values, to=1)
        values = step("Reshape", "groups", values, constant("group_shape", np.array([0, 0, groups, columns // groups])))
        if points is not None:
            place = points.converted("U8", Rows(groups, 1, groups) if packed else None)
            point = self.add(f"{tensor}/zero_point", "UINT8", [rows, groups, 1], place)
            point = step("Cast", "zero_point", step("Gather", "zero_codes", point, indexes, axis=0), to=1)
            values = step("Sub", "centred", values, point)
        elif packed:
            values = step("Sub", "centred", values, constant("8", np.float32(8)))
        scale = self.add_float(f"{tensor}/scale", weight.scale, [rows, groups, 1])
        values = step("Mul", "scaled", values, step("Gather", "scale", scale, indexes, axis=0))
        take_over(reader, step("Reshape", "rows", values, constant("row_shape", np.array([0, 0, columns]))))

    def dequantize(self, tensor: str, weight: QuantizedWeight, value: ir.Value) -> None:
        """Let `value` come from a DequantizeLinear over the output channels, and let transpositions stand before it.

        ONNX Runtime transposes constant codes when it loads them, and takes its 8-bit kernels for what is left.
        """
        codes = weight.codes
        if weight.bits != 8 or weight.groups != 1:
            raise ConversionError(
                f"{tensor} is neither a matrix nor a table, and not in 8 bit per row: use int8 or fp16"
            )
        dtype = {"u8": "UINT8", "i8": "INT8"}[codes.dtype]
        stored = self.add(tensor, dtype, list(codes.shape), codes.place)
        parts = [self.add(f"{tensor}/scale", "FLOAT", [codes.shape[0]], weight.scale.converted("F32"))]
        if weight.zero_point is not None:
            parts.append(self.add(f"{tensor}/zero_point", dtype, [codes.shape[0]], weight.zero_point.place))
        first = self.model.graph[0]
        for reader in value.consumers():
            if reader.op_type == "Transpose":
                turned = self.insert(first, "Transpose", [stored], f"{tensor}/transposed", perm=[1, 0])
                take_over(reader, self.insert(first, "DequantizeLinear", [turned, *parts], f"{tensor}/float", axis=1))
            else:
                whole = self.insert(first, "DequantizeLinear", [stored, *parts], f"{tensor}/float", axis=0)
                reader.replace_input_with(reader.inputs.index(value), whole)
