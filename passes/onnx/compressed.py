"""Reading the weights of a compressed OpenVINO IR from its files: codes, scales, zero points and scaled activations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from manifests.errors import ConversionError
from passes.compat.nncf import INPUT_SCALINGS
from passes.export.weights import Rows, WeightBytes
from passes.vocabulary import operation_name

__all__ = ["Activation", "CompressedGraph", "Constant", "QuantizedWeight"]

_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8}
_FLOATS = {"f32": np.float32, "f16": np.float16}
# Operations between a quantized activation and the layer that reads it; they change no value.
_MOVING = {"Reshape", "Transpose"}
_WEIGHT_PORTS = {"MatMul": 1, "Convolution": 1, "Gather": 0}


@dataclass(frozen=True)
class Constant:
    """A constant of the graph: its dtype in OpenVINO's spelling, its shape, and the place of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    place: WeightBytes

    @property
    def count(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def converted(self, wanted: str, rows: Rows | None = None) -> WeightBytes:
        """The place of its bytes, to be converted to the dtype `wanted`, and perhaps widened, while they are copied."""
        place = self.place
        return WeightBytes(place.file, place.offset, place.size, self.dtype.upper(), wanted, rows)

    def read(self) -> np.ndarray:
        """Read the values of a small float constant."""
        with self.place.file.open("rb") as file:
            file.seek(self.place.offset)
            return np.frombuffer(file.read(self.place.size), _FLOATS[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight: codes [rows, ...], and a scale for each row or for each group in a row.

    `zero_point` is None if the quantization is symmetric.
    """

    codes: Constant
    scale: Constant
    zero_point: Constant | None

    @property
    def bits(self) -> int:
        """Number of bits of one code."""
        return _BITS[self.codes.dtype]

    @property
    def axis(self) -> int | None:
        """The axis whose positions have a scale each; None if there are other scales than these."""
        long = [place for place, size in enumerate(self.scale.shape) if size > 1]
        axis = long[0] if long else 0
        return axis if self.scale.count == self.codes.shape[axis] else None

    @property
    def groups(self) -> int:
        """Number of scales of one row."""
        return self.scale.count // self.codes.shape[0]


@dataclass(frozen=True)
class Activation:
    """What compression does to the input of a layer: a multiplication, then quantization to 8 bit; either may be missing.

    Attributes:
        factors: the factors of the multiplication, if there is one.
        scale: scale of the unsigned 8-bit values; 0 if the input stays float.
        zero_point: zero point of the unsigned 8-bit values.
    """

    factors: Constant | None = None
    scale: float = 0.0
    zero_point: int = 0


class CompressedGraph:
    """The constants of an IR, found by the in-memory names of the checkpoint's tensors.

    Args:
        xml: the graph; its .bin file lies beside it. The layers that read weights must be named after the tensors.
    """

    def __init__(self, xml: Path) -> None:
        self._xml = xml
        tree = ElementTree.parse(xml)
        self._layers = {layer.attrib["id"]: layer for layer in tree.iterfind("layers/layer")}
        self._by_name = {layer.attrib["name"]: key for key, layer in self._layers.items()}
        self._inputs: dict[str, dict[int, str]] = {}
        for edge in tree.iterfind("edges/edge"):
            inputs = self._inputs.setdefault(edge.attrib["to-layer"], {})
            inputs[int(edge.attrib["to-port"])] = edge.attrib["from-layer"]

    def weight(self, tensor: str) -> Constant | QuantizedWeight:
        """The weight that the graph holds for a tensor: a float constant or a quantized weight.

        Raises:
            ConversionError: if the graph holds no such weight.
        """
        key = self._by_name.get(tensor)
        if key is not None and self._is_float(key):
            return self._constant(key)
        layer = self._by_name.get(operation_name(tensor))
        if layer is None or self._type(layer) not in _WEIGHT_PORTS:
            raise ConversionError(f"{self._xml} has no weight {tensor}: remove it from the store and convert again")
        source = self._inputs[layer][_WEIGHT_PORTS[self._type(layer)]]
        return self._quantized(tensor, source)

    def has_layer(self, name: str) -> bool:
        """Whether a layer that reads a weight has this name."""
        return name in self._by_name

    def activation(self, layer: str) -> Activation:
        """What the graph does to the input of a layer that reads a weight; `Activation()` if it does nothing.

        Args:
            layer: name of the layer; nothing is done to the input of a layer that the graph does not have.
        """
        key = self._by_name.get(layer)
        if key is None or self._type(key) not in {"MatMul", "Convolution"}:
            return Activation()
        scale, zero_point = 0.0, 0
        while True:
            key = self._inputs[key][0]
            name, kind = self._layers[key].attrib["name"], self._type(key)
            if kind == "FakeQuantize":
                scale, zero_point = self._eight_bits(key)
            elif kind == "Multiply" and name.endswith(INPUT_SCALINGS):
                return Activation(self._factors(key), scale, zero_point)
            elif kind not in _MOVING:
                return Activation(None, scale, zero_point)

    def _is_float(self, key: str) -> bool:
        """Whether a layer is a float constant, or the conversion of one."""
        while self._type(key) == "Convert":
            key = self._inputs[key][0]
        return self._type(key) == "Const" and self._constant(key).dtype in _FLOATS

    def _type(self, key: str) -> str:
        return self._layers[key].attrib["type"]

    def _constant(self, key: str) -> Constant:
        """The constant that a layer is, or that it converts."""
        while self._type(key) == "Convert":
            key = self._inputs[key][0]
        data = self._layers[key].find("data")
        if self._type(key) != "Const" or data is None:
            name = self._layers[key].attrib["name"]
            raise ConversionError(f"{self._xml}: {name} is a {self._type(key)}, expected a constant")
        values = data.attrib
        return Constant(
            values["element_type"],
            tuple(int(size) for size in values["shape"].split(",") if size.strip()),
            WeightBytes(self._xml.with_suffix(".bin"), int(values["offset"]), int(values["size"])),
        )

    def _quantized(self, tensor: str, key: str) -> QuantizedWeight:
        """Codes, zero point and scale of (codes - zero point) * scale, after which the graph may convert or reshape."""
        while self._type(key) in {"Convert", "Reshape"}:
            key = self._inputs[key][0]
        if self._type(key) != "Multiply":
            raise ConversionError(f"{self._xml}: {tensor} comes from a {self._type(key)}, expected codes times a scale")
        codes, scale = self._inputs[key][0], self._constant(self._inputs[key][1])
        if self._type(codes) != "Subtract":
            return QuantizedWeight(self._constant(codes), scale, None)
        codes, zero_point = self._inputs[codes][0], self._inputs[codes][1]
        return QuantizedWeight(self._constant(codes), scale, self._constant(zero_point))

    def _factors(self, key: str) -> Constant:
        constants = [source for source in self._inputs[key].values() if self._type(source) in {"Const", "Convert"}]
        return self._constant(constants[0])

    def _eight_bits(self, key: str) -> tuple[float, int]:
        """Scale and zero point of a FakeQuantize."""
        data = self._layers[key].find("data")
        low, high = (self._constant(self._inputs[key][port]).read() for port in (1, 2))
        if data is None or data.attrib["levels"] != "256" or low.size != 1:
            raise ConversionError(
                f"{self._xml}: {self._layers[key].attrib['name']} does not quantize to 8 bit with one scale"
            )
        scale = (float(high.item()) - float(low.item())) / 255
        return scale, round(-float(low.item()) / scale)
