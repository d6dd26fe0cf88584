"""OpenVINO IR whose weights stay on disk.

An IR is a graph in XML and its constants in a .bin file. Here the large constants of a graph become inputs that remember
where their bytes lie (`detach`), so that graphs can be joined and transformed in the memory that the graph alone takes;
when the result is written, the inputs become constants again and their bytes are copied from file to file (`write`).
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from manifests.errors import ConversionError
from manifests.model import FileRecord

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["WeightBytes", "count_weights", "detach", "write"]

# Smaller constants (axes, shapes, scalars) stay in the graph, where transformations may need their values.
_SMALL = 1024
_ALIGNMENT = 64
_CHUNK = 1 << 24


@dataclass(frozen=True)
class WeightBytes:
    """Where the bytes of one constant lie."""

    file: Path
    offset: int
    size: int


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


def write(model: ov.Model, weights: dict[str, WeightBytes], xml: Path) -> list[FileRecord]:
    """Write a graph with detached constants as an ordinary IR, and hash it on the way.

    Memory use does not depend on the size of the weights.

    Returns:
        The records of the .xml and the .bin, relative to their folder.
    """
    import openvino as ov

    binary = xml.with_suffix(".bin")
    with tempfile.TemporaryDirectory(prefix=".skeleton-", dir=xml.parent) as folder:
        skeleton = Path(folder) / "skeleton.xml"
        ov.serialize(model, skeleton)
        tree = ElementTree.parse(skeleton)
        with binary.open("wb") as stream, skeleton.with_suffix(".bin").open("rb") as small:
            shutil.copyfileobj(small, stream)
            end = stream.tell()
            copies = []
            for layer in tree.iterfind("layers/layer[@type='Parameter']"):
                source = weights.get(layer.attrib["name"])
                if source is None:
                    continue
                offset = (end + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
                copies.append((offset, source))
                end = offset + source.size
                layer.set("type", "Const")
                data = layer.find("data")
                assert data is not None
                data.set("offset", str(offset))
                data.set("size", str(source.size))
            if len(copies) != len(weights):
                raise ConversionError(f"{len(weights) - len(copies)} weights got lost while {xml.name} was put together")
            for offset, source in copies:
                stream.write(bytes(offset - stream.tell()))
                _copy(source, stream)
        tree.write(xml, xml_declaration=True, encoding="utf-8")
    return [_record(xml), _record(binary)]


def _copy(source: WeightBytes, stream: object) -> None:
    left = source.size
    with source.file.open("rb") as file:
        file.seek(source.offset)
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise ConversionError(f"{source.file} is shorter than its graph says")
            stream.write(chunk)  # type: ignore[attr-defined]
            left -= len(chunk)


def _record(path: Path) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(path=path.name, size=path.stat().st_size, sha256=digest)


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
