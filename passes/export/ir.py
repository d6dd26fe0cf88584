"""OpenVINO IR whose weights stay on disk.

An IR is a graph in XML and its constants in a .bin file. Here the large constants of a graph become inputs that remember
where their bytes lie (`detach`), so that graphs can be joined and transformed in the memory that the graph alone takes;
when the result is written, the inputs become constants again and their bytes are copied from file to file (`write`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from manifests.errors import ConversionError
from manifests.model import FileRecord
from passes.export.weights import WeightBytes, write_bytes

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["DECOMPRESSION", "count_weights", "detach", "number_names", "write"]

# Smaller constants (axes, shapes, scalars) stay in the graph, where transformations may need their values.
_SMALL = 1024
_ALIGNMENT = 64
_AUTOMATIC_NAME = re.compile(r"^((?:.*/)?[A-Z][A-Za-z0-9]*)_\d+$")
# What the names of conversions from half precision end with.
DECOMPRESSION = "/decompression"


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
    record = write_bytes(xml.with_suffix(".bin"), small, copies, end)
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
