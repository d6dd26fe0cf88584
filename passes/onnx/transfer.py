"""*transfer-onnx*: one block as an ONNX graph, with the compressed weights of its OpenVINO graph.

Codes, scales and zero points are those of the OpenVINO graph, so that both targets have the same weights and share the
compressed blocks in the store. They stay in the .bin file until the component is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import ConversionError
from passes.base import Context, Form, Intermediate, TransformPass, named_failure
from passes.block_pass import StoredBlocks
from passes.export.weights import Rows, WeightBytes
from passes.onnx.compressed import Activation, CompressedGraph, Constant, QuantizedWeight
from passes.onnx.graph import (
    MICROSOFT,
    OnnxBlocks,
    add_constant,
    add_float,
    add_weight,
    read_trace,
    take_over,
    weight_readers,
    weight_values,
)
from passes.store import digest
from passes.vocabulary import Block

if TYPE_CHECKING:
    import onnx_ir as ir

    from passes.onnx.graph import Detached

__all__ = ["TransferOnnxPass"]

# MatMulNBits has no scale for a whole row, so the scale of a row is repeated for each block of it; blocks of 128 ran fastest.
_ROW_BLOCK = 128
_LARGEST_BLOCK, _LEAST_BLOCK, _PADDED_BLOCK = 256, 16, 32


class TransferredBlocks(OnnxBlocks):
    """Blocks with the weights of compressed OpenVINO blocks."""

    def __init__(self, item: TransferOnnxPass, before: StoredBlocks, traces: Path) -> None:
        self.component, self._item, self._before, self._traces = before.component, item, before, traces
        self.key = digest(before.key, str(item), item.version, traces.name)

    def prepare(self) -> None:
        """See `Intermediate`."""
        self._before.prepare()

    def discard(self) -> None:
        """See `Intermediate`."""
        self._before.discard()

    def detached(self, index: int) -> Detached:
        """See `OnnxBlocks`."""
        block = self.component.blocks[index]
        with named_failure(self._item, self.component.name, block.name):
            return self._item.transfer(block, self._traces, CompressedGraph(self._before.graph_file(index)))


@dataclass(frozen=True)
class TransferOnnxPass(TransformPass):
    """Matrix products with compressed weights become MatMulNBits; with quantized activations too, they become QDQ.

    Embedding tables stay compressed, and only the rows that are looked up are dequantized.

    MatMulNBits reads NNCF's 4-bit codes without reordering them. For one token and a 2048 x 5632 matrix on one core with
    AVX-512 VNNI, it takes 0.2 ms, and float32 takes 2.2 ms. Blocked DequantizeLinear takes 26 ms, unless ONNX Runtime turns
    it into MatMulNBits when it loads the graph, for which the codes would have to be transposed.

    Attributes:
        accuracy_level: option of MatMulNBits. 4 quantizes activations to 8 bit per block, and is four times as fast as 0,
            which computes in float32; with 8-bit weights, 0 takes 50 ms in the example above.
    """

    name = "transfer-onnx"
    version = 2
    takes = (Form.COMPRESSED_BLOCKS,)

    accuracy_level: int = 4

    @property
    def makes(self) -> Form:
        return Form.ONNX_BLOCKS

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, StoredBlocks)
        return TransferredBlocks(self, before, context.onnx_traces)

    def transfer(self, block: Block, traces: Path, compressed: CompressedGraph) -> Detached:
        """The block's ONNX graph with its compressed weights detached, and the places of their bytes.

        Args:
            block: the block.
            traces: the folder into which `passes.onnx.trace.trace_kinds` has written.
            compressed: the compressed OpenVINO graph of the block.

        Raises:
            ConversionError: if `compressed` lacks a weight, or an operation that reads it does not support its compression.
        """
        model = read_trace(traces, block)
        filling = _Filling(model, {}, self.accuracy_level)
        for value, tensor in weight_values(model, block):
            model.graph.inputs.remove(value)
            weight = compressed.weight(tensor)
            readers = weight_readers(value)
            activations = [compressed.activation(reader.name or "") for reader in readers]
            for reader, activation in zip(readers, activations, strict=True):
                if activation != Activation():
                    filling.scale_input(reader, activation)
            if isinstance(weight, Constant):
                shape = [int(size) for size in value.shape or ()]  # type: ignore[arg-type]
                value.replace_all_uses_with(filling.add_float(tensor, weight, shape))
                continue
            kinds = {reader.op_type for reader in readers}
            if lost := [reader for reader in readers if not compressed.has_layer(reader.name or "")]:
                raise ConversionError(
                    f"{lost[0].op_type} {lost[0].name} reads {tensor}, and no layer of the compressed block does"
                )
            if kinds == {"Gather"}:
                for reader in readers:
                    filling.look_up(tensor, weight, reader)
            elif kinds == {"MatMul"} and _transposed(value) and not any(item.scale for item in activations):
                filling.multiply(tensor, weight, value, readers)
            else:
                filling.dequantize(tensor, weight, value)
        model.graph.sort()
        return model, filling.weights


@dataclass
class _Filling:
    """A block's ONNX graph while its weights are put in, and the places of their bytes."""

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
        """Add to the input of a layer the scaling by AWQ or SmoothQuant, and the quantization to 8 bit."""
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
        """Replace the matrix products with a transposed weight [rows, columns] by MatMulNBits."""
        import onnx_ir as ir

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
        """Codes, scales and zero points in the layout of MatMulNBits, and the attributes of the operation."""
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
            if bits == 4 and blocks % 2:  # a byte holds two zero points, and every row begins with a new byte
                wider = Rows(groups, repeat, blocks + 1)
            place = points.converted(f"U{bits}", wider)
            parts.append(self.add(f"{tensor}/zero_point", "UINT8", [rows * -(-blocks * bits // 8)], place))
        return parts, {"K": columns, "N": rows, "bits": bits, "block_size": block}

    def look_up(self, tensor: str, weight: QuantizedWeight, reader: ir.Node) -> None:
        """Replace a look-up in a table: gather codes, scales and zero points of the rows, and dequantize these."""
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
        """Replace `value` by a DequantizeLinear with one scale per output channel, after any transposition of the codes.

        ONNX Runtime transposes constant codes when it loads them, and uses its 8-bit kernels for the remaining operations.
        """
        codes, axis = weight.codes, weight.axis
        if weight.bits != 8 or axis is None:
            raise ConversionError(
                f"{tensor} is neither a matrix nor a table, and is not in 8 bit with one scale per channel: use int8 or fp16"
            )
        dtype = {"u8": "UINT8", "i8": "INT8"}[codes.dtype]
        stored = self.add(tensor, dtype, list(codes.shape), codes.place)
        parts = [self.add(f"{tensor}/scale", "FLOAT", [codes.shape[axis]], weight.scale.converted("F32"))]
        if weight.zero_point is not None:
            parts.append(self.add(f"{tensor}/zero_point", dtype, [codes.shape[axis]], weight.zero_point.place))
        first = self.model.graph[0]
        for reader in value.consumers():
            if reader.op_type == "Transpose":
                turned = self.insert(first, "Transpose", [stored], f"{tensor}/transposed", perm=[1, 0])
                take_over(
                    reader, self.insert(first, "DequantizeLinear", [turned, *parts], f"{tensor}/float", axis=1 - axis)
                )
            else:
                whole = self.insert(first, "DequantizeLinear", [stored, *parts], f"{tensor}/float", axis=axis)
                reader.replace_input_with(reader.inputs.index(value), whole)


def _transposed(value: ir.Value) -> bool:
    """Whether all that reads a weight reads it transposed, as MatMulNBits does."""
    return all(reader.op_type == "Transpose" for reader in value.consumers())
