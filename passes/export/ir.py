"""OpenVINO IR whose weights stay on disk.

An IR is a graph in XML and its constants in a .bin file. Here the large constants of a graph become inputs that remember
where their bytes lie (`detach`), so that graphs can be joined and transformed in the memory that the graph alone takes;
when the result is written, the inputs become constants again and their bytes are copied from file to file (`write`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from manifests.errors import ConversionError
from manifests.files import CHUNKS_AHEAD, write_hashed
from manifests.model import FileRecord

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov

__all__ = ["DECOMPRESSION", "WeightBytes", "count_weights", "detach", "number_names", "write"]

# Smaller constants (axes, shapes, scalars) stay in the graph, where transformations may need their values.
_SMALL = 1024
_ALIGNMENT = 64
# Small enough for a chunk to stay in a core's cache from reading to hashing.
_CHUNK = 1 << 18
_AUTOMATIC_NAME = re.compile(r"^((?:.*/)?[A-Z][A-Za-z0-9]*)_\d+$")
# What the names of conversions from half precision end with.
DECOMPRESSION = "/decompression"


_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class WeightBytes:
    """Where the bytes of one constant lie: `size` bytes from `offset` of `file`.

    `stored` and `wanted` are F32, F16 or BF16 where the values are to be converted on the way, else empty.
    """

    file: Path
    offset: int
    size: int
    stored: str = ""
    wanted: str = ""

    @property
    def final_size(self) -> int:
        """Bytes after the conversion."""
        if self.stored == self.wanted:
            return self.size
        return self.size // int(_NUMPY[self.stored][2:]) * int(_NUMPY[self.wanted][2:])


def detach(xml: Path, rename: Callable[[str], str]) -> tuple[ov.Model, dict[str, WeightBytes]]:
    """Read an IR with its large constants as inputs.

    Args:
        xml: the graph; its .bin lies beside it.
        rename: gives each of these inputs a name that no other graph's have.

    Returns:
        The graph, and the bytes behind each of those inputs by friendly name.
    """
    import openvino as ov

    binary = xml.with_suffix(".bin")
    tree = ElementTree.parse(xml)
    weights: dict[str, WeightBytes] = {}
    small = bytearray()
    with binary.open("rb") as stream:
        for layer in tree.iterfind("layers/layer[@type='Const']"):
            data = layer.find("data")
            assert data is not None
            offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
            if size < _SMALL:
                stream.seek(offset)
                small += bytes(-len(small) % _ALIGNMENT)
                data.set("offset", str(len(small)))
                small += stream.read(size)
                continue
            name = rename(layer.attrib["name"])
            weights[name] = WeightBytes(binary, offset, size)
            layer.set("type", "Parameter")
            layer.set("name", name)
            del data.attrib["offset"], data.attrib["size"]
    model = ov.Core().read_model(ElementTree.tostring(tree.getroot()), bytes(small))
    return model, weights


def write(model: ov.Model, weights: dict[str, WeightBytes], xml: Path) -> FileRecord:
    """Write a graph with detached constants as an ordinary IR.

    Memory use does not depend on the size of the weights.

    Returns:
        The record of the .bin, hashed while it is written.
    """
    import openvino as ov

    with tempfile.TemporaryDirectory(prefix=".skeleton-", dir=xml.parent) as folder:
        skeleton = Path(folder) / "skeleton.xml"
        ov.serialize(model, skeleton)
        tree = ElementTree.parse(skeleton)
        small = skeleton.with_suffix(".bin").read_bytes()
    end = len(small)
    copies: list[tuple[WeightBytes, int]] = []
    for layer in tree.iterfind("layers/layer"):
        if layer.attrib["name"].endswith(DECOMPRESSION):
            # Tells a plugin to keep the weight in half precision instead of folding the conversion.
            ElementTree.SubElement(
                ElementTree.SubElement(layer, "rt_info"), "attribute", name="decompression", version="0"
            )
        source = weights.get(layer.attrib["name"])
        if source is None or layer.attrib["type"] != "Parameter":
            continue
        offset = (end + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        copies.append((source, offset))
        end = offset + source.final_size
        layer.set("type", "Const")
        data = layer.find("data")
        assert data is not None
        data.set("offset", str(offset))
        data.set("size", str(source.final_size))
    if len(copies) != len(weights):
        raise ConversionError(f"{len(weights) - len(copies)} weights got lost while {xml.name} was put together")
    record = write_hashed(xml.with_suffix(".bin"), chain([small], _chunks(copies, len(small))), end)
    _number_names(tree)
    tree.write(xml, xml_declaration=True, encoding="utf-8")
    return record


def number_names(xml: Path) -> None:
    """Give the automatic names of an IR (`Multiply_4711`) numbers that do not depend on what the process did before."""
    tree = ElementTree.parse(xml)
    _number_names(tree)
    tree.write(xml, xml_declaration=True, encoding="utf-8")


def _number_names(tree: ElementTree.ElementTree[Any]) -> None:
    counts: dict[str, int] = {}
    for layer in tree.iterfind("layers/layer"):
        match = _AUTOMATIC_NAME.match(layer.attrib["name"])
        if match is not None:
            counts[match[1]] = counts.get(match[1], 0) + 1
            layer.set("name", f"{match[1]}_{counts[match[1]]}")


def _chunks(copies: list[tuple[WeightBytes, int]], position: int) -> Iterator[bytes | memoryview]:
    """The bytes of the constants one after the other, with the gaps between their places filled.

    A chunk is overwritten when `CHUNKS_AHEAD` + 1 others have followed it: fresh memory for each would take longer than the rest.
    """
    import numpy as np

    raw = np.empty(_CHUNK, np.uint8)
    buffers = cycle([np.empty(2 * _CHUNK, np.uint8) for _ in range(CHUNKS_AHEAD + 2)])
    for source, place in copies:
        yield bytes(place - position)
        position = place + source.final_size
        with source.file.open("rb", buffering=0) as file:
            file.seek(source.offset)
            for first in range(0, source.size, _CHUNK):
                buffer = next(buffers)
                chunk = (buffer if source.stored == source.wanted else raw)[: min(_CHUNK, source.size - first)]
                if file.readinto(chunk) != chunk.size:  # type: ignore[arg-type]
                    raise ConversionError(f"{source.file} is shorter than its graph says")
                yield (chunk if source.stored == source.wanted else _convert(chunk, source, buffer)).data


def _convert(chunk: np.ndarray, source: WeightBytes, buffer: np.ndarray) -> np.ndarray:
    """The values of a chunk in the wanted dtype, at the start of `buffer`."""
    import numpy as np

    values = chunk.view(_NUMPY[source.stored])
    result = buffer.view(_NUMPY[source.wanted])[: values.size]
    if source.stored == "BF16":
        np.take(_of_bfloat16(_NUMPY[source.wanted]), values, out=result, mode="clip")
    else:
        with np.errstate(over="ignore"):
            np.copyto(result, values, casting="unsafe")
    # Infinity and NaN have all bits of the exponent set; on the bits, the check takes no time beside the conversion.
    if source.wanted == "F16" and np.bitwise_and(result.view(np.uint16), 0x7FFF).max() >= 0x7C00:
        raise ConversionError(
            f"a weight in {source.file.name} is beyond the range of float16: use fp32 instead of fp16"
        )
    return result


@cache
def _of_bfloat16(dtype: str) -> np.ndarray:
    """What each of the 65536 values of bfloat16 is in another dtype; to look them up is faster than to convert in numpy."""
    import numpy as np

    # bfloat16 is the upper half of a float32.
    values = np.left_shift(np.arange(1 << 16, dtype=np.uint16), 16, dtype=np.uint32).view("<f4")
    with np.errstate(over="ignore"):
        return values.astype(dtype)


_WEIGHT_DTYPES = {"u4": "int4", "i4": "int4", "u8": "int8", "i8": "int8", "f16": "f16", "bf16": "bf16", "f32": "f32"}


def count_weights(xml: Path) -> dict[str, int]:
    """Count the weight values of an IR by dtype, from the file itself.

    Counted are constants of two dimensions or more and at least 1 KiB; the scales and zero points of compressed weights,
    recognised by their innermost dimension of 1, are not weights.
    """
    counts: dict[str, int] = {}
    for data in ElementTree.parse(xml).iterfind("layers/layer[@type='Const']/data"):
        shape = [int(part) for part in data.attrib["shape"].split(",") if part.strip()]
        dtype = _WEIGHT_DTYPES.get(data.attrib["element_type"])
        if dtype is None or len(shape) < 2 or shape[-1] == 1 or int(data.attrib["size"]) < _SMALL:
            continue
        count = 1
        for length in shape:
            count *= length
        counts[dtype] = counts.get(dtype, 0) + count
    return dict(sorted(counts.items()))
