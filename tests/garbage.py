"""Ways to spoil an artifact, as a disk, a bad build or a hand would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

from manifests.files import file_record
from manifests.io import read_manifest, write_manifest
from passes.export.checksums import block_checksums, block_constants
from vlmconvert.families import load_family
from vlmconvert.targets.openvino.target import TARGET as OPENVINO

LANGUAGE_MODEL = "openvino_language_model.xml"
VISION_ENCODER = "openvino_vision_encoder.xml"


def copy(artifact: Path, target: Path) -> Path:
    """A copy whose files may be changed."""
    shutil.copytree(artifact, target)
    for path in target.iterdir():
        path.chmod(0o644)
    return target


def flip_bit(path: Path, share: float) -> None:
    """Flip one bit at a share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def rehash(folder: Path) -> None:
    """Make the manifest fit the files again, as if a bad build had been published."""
    manifest = read_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    parts = {part.name: part for part in load_family(manifest.family).components(config)}
    components = [
        item.model_copy(
            update={
                "files": [file_record(folder / record.path, folder) for record in item.files],
                "blocks": block_checksums(folder / f"{OPENVINO.stem(parts[item.name])}.xml", parts[item.name]),
            }
        )
        for item in manifest.components
    ]
    write_manifest(manifest.model_copy(update={"components": components}), folder)


def _places(xml: Path) -> dict[str, slice]:
    places = {}
    for layer in ElementTree.parse(xml).iterfind("layers/layer[@type='Const']"):
        data = layer.find("data").attrib
        places[layer.attrib["name"]] = slice(int(data["offset"]), int(data["offset"]) + int(data["size"]))
    return places


def spoil_scale(folder: Path) -> None:
    """One of the scales of one layer of block layers.2 is 16 times too large."""
    xml = folder / LANGUAGE_MODEL
    place = _places(xml)["model.language_model.layers.2.mlp.down_proj.weight/scale"]
    data = bytearray(xml.with_suffix(".bin").read_bytes())
    data[place.start + 1] ^= 0x10  # in the exponent of a little-endian float16
    xml.with_suffix(".bin").write_bytes(data)


def swap_blocks(folder: Path) -> None:
    """Blocks layers.2 and layers.4 have each other's weights."""
    xml = folder / LANGUAGE_MODEL
    data = xml.with_suffix(".bin").read_bytes()
    swapped = bytearray(data)
    prefixes = [f"model.language_model.layers.{index}." for index in (2, 4)]
    places = _places(xml)
    for name in [name for name in places if name.startswith(prefixes[0])]:
        one, other = places[name], places[name.replace(*prefixes)]
        swapped[one], swapped[other] = data[other], data[one]
    xml.with_suffix(".bin").write_bytes(swapped)


def zero_norm(folder: Path) -> None:
    """The norm in front of the attention of block layers.3, which no compression touches, is zero."""
    xml = folder / LANGUAGE_MODEL
    place = _places(xml)["model.language_model.layers.3.input_layernorm.weight"]
    data = bytearray(xml.with_suffix(".bin").read_bytes())
    data[place] = bytes(place.stop - place.start)
    xml.with_suffix(".bin").write_bytes(data)


def zero_quantized_weight(folder: Path) -> None:
    """Some int8 weights of one vision layer are zero; quantization has left their constant without a telling name."""
    xml = folder / VISION_ENCODER
    component = load_family("mllama").components(json.loads((folder / "config.json").read_text()))[0]
    offset, size = max(block_constants(xml, component)["transformer.layers.1"], key=lambda place: place[1])
    data = bytearray(xml.with_suffix(".bin").read_bytes())
    data[offset : offset + size // 2] = bytes(size // 2)
    xml.with_suffix(".bin").write_bytes(data)


# How -> the component and the blocks of it that it spoils.
GARBAGE = {
    spoil_scale: ("language_model", {"layers.2"}),
    swap_blocks: ("language_model", {"layers.2", "layers.4"}),
    zero_norm: ("language_model", {"layers.3"}),
    zero_quantized_weight: ("vision_encoder", {"transformer.layers.1"}),
}
