"""OpenVINO IR whose weights stay on disk.

An IR is a graph in XML and its constants in a .bin file. `detach` reads a graph with its large constants replaced by inputs,
and returns the places of their bytes, so that graphs can be joined and transformed without loading weights. `write` turns
the inputs into constants again, and copies their bytes from file to file.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from manifests.errors import ConversionError
from manifests.model import FileRecord
from passes.compat.openvino import AUTOMATIC_NAME, keep_half_precision
from passes.export.weights import WeightBytes, write_bytes

if TYPE_CHECKING:
    import openvino as ov

    # A graph without its weights, and the place of each weight's bytes.
    Detached = tuple[ov.Model, dict[str, WeightBytes]]

__all__ = ["BLOCK_FILE", "DECOMPRESSION", "count_weights", "detach", "finish", "store_in_half", "write"]

# File name of a stored block's graph; its weights are in the .bin file beside it.
BLOCK_FILE = "block.xml"

# Smaller constants (axes, shapes, scalars) stay in the graph, where transformations may need their values.
_SMALL = 1024
_ALIGNMENT = 64
# Name ending of conversions from half precision.
DECOMPRESSION = "/decompression"


def detach(xml: Path, rename: Callable[[str], str], least: int = _SMALL) -> Detached:
    """Read an IR with its large constants as inputs.

    Args:
        xml: the graph; its .bin file lies beside it.
        rename: takes the name of a constant, and returns one that is unique among all graphs to be joined.
        least: number of bytes from which a constant counts as large.

    Returns:
        The graph, and for each of these inputs: friendly name -> place of its bytes.
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
            if size < least:
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
        check_written(skeleton)
        tree = ElementTree.parse(skeleton)
        small = skeleton.with_suffix(".bin").read_bytes()
    end = len(small)
    copies: list[tuple[WeightBytes, int]] = []
    for layer in tree.iterfind("layers/layer"):
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
        raise ConversionError(f"{len(weights) - len(copies)} weights got lost while {xml.name} was written")
    record = write_bytes(xml.with_suffix(".bin"), small, copies, end)
    _finish(tree, xml)
    return record


def check_written(xml: Path) -> None:
    """Check that OpenVINO has written all weights of an IR: it does not notice a full disk.

    Raises:
        OSError: if the .bin is too short.
    """
    places = (data.attrib for data in ElementTree.parse(xml).iterfind("layers/layer[@type='Const']/data"))
    end = max((int(place["offset"]) + int(place["size"]) for place in places), default=0)
    binary = xml.with_suffix(".bin")
    if end and binary.stat().st_size < end:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(binary))


def store_in_half(model: ov.Model, tensors: Collection[str]) -> None:
    """Store float32 constants as float16, in place; the graph still computes in float32.

    Args:
        model: the graph.
        tensors: names of the constants.

    Raises:
        ConversionError: if a constant is missing, because it has been compressed, or has values beyond the range of float16.
    """
    import numpy as np
    from openvino import opset13

    left = set(tensors)
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if name in left and node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "f32":
            with np.errstate(over="ignore"):
                values = node.data.astype(np.float16)
            if not np.isfinite(values).all():
                raise ConversionError(f"{name} has values beyond the range of float16: leave its layer compressed")
            half = opset13.constant(values, name=name)
            node.output(0).replace(opset13.convert(half, "f32", name=f"{name}{DECOMPRESSION}").output(0))
            left.remove(name)
    if left:
        raise ConversionError(f"{sorted(left)[0]} must stay float, but the graph has no float32 constant of that name")


def finish(xml: Path) -> None:
    """Finish an IR that OpenVINO has written.

    Automatic names (`Multiply_4711`) are renumbered, because their numbers depend on what the process did before. Conversions
    from half precision are marked, so that plugins do not fold them.
    """
    _finish(ElementTree.parse(xml), xml)


def _finish(tree: ElementTree.ElementTree[Any], xml: Path) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for layer in tree.iterfind("layers/layer"):
        if layer.attrib["name"].endswith(DECOMPRESSION):
            keep_half_precision(layer)
        match = AUTOMATIC_NAME.match(layer.attrib["name"])
        if match is not None:
            name, ending = match.groups("")
            counts[name, ending] += 1
            layer.set("name", f"{name}_{counts[name, ending]}{ending}")
    tree.write(xml, xml_declaration=True, encoding="utf-8")


_WEIGHT_DTYPES = {"u4": "int4", "i4": "int4", "u8": "int8", "i8": "int8", "f16": "f16", "bf16": "bf16", "f32": "f32"}


def count_weights(xml: Path) -> dict[str, int]:
    """Count the weight values of an IR by dtype, as found in the file.

    Constants with at least two dimensions and 1 KiB are counted, but not the scales and zero points of compressed weights,
    which are recognised by their innermost dimension of 1.
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
