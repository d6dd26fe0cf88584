"""Artifacts that a stranger has changed to mislead `verify`, `run` or `report`; their checksums fit again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from manifests.files import file_record
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, checksum_line

__all__ = ["CHANGED", "Changed"]

LANGUAGE, VISION = "openvino_language_model", "openvino_vision_embeddings_model"


@dataclass(frozen=True)
class Changed:
    """One artifact.

    Attributes:
        name: what is changed.
        change: takes the folder of a copy, and changes it.
        target: target of the artifact that is copied.
        finding: a part of what `verify --no-run` must say; "" if the change is none that it can see.
        runs: whether it may run.
        rehashed: whether sizes and hashes in the manifest fit again.
    """

    name: str
    change: Callable[[Path], object]
    finding: str
    target: str = "openvino"
    runs: bool = False
    rehashed: bool = True

    def apply(self, folder: Path) -> None:
        """Change the artifact in a folder, and make its manifest fit."""
        self.change(folder)
        if self.rehashed:
            rehash(folder)


def rehash(folder: Path) -> None:
    """Give the files that the manifest lists their new sizes and hashes, and the manifest its checksum."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
        records = [*manifest["assets"], *(file for part in manifest["components"] for file in part["files"])]
        for record in records:
            place = folder / record["path"]
            if place.is_file() and place.resolve().is_relative_to(folder.resolve()):
                record.update(file_record(place, folder).model_dump())
        path.write_text(json.dumps(manifest))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return  # no manifest any more
    (folder / CHECKSUM_NAME).write_text(checksum_line(path))


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        content = json.loads((folder / MANIFEST_NAME).read_text())
        change(content)
        (folder / MANIFEST_NAME).write_text(json.dumps(content))

    return write


def component(**fields: Any) -> Callable[[Path], object]:
    """The language model's record has other fields."""
    return manifest(lambda content: content["components"][-1].update(fields))


def file(**fields: Any) -> Callable[[Path], object]:
    return manifest(lambda content: content["components"][-1]["files"][0].update(fields))


def settings(name: str, **fields: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def graph(pattern: str, replacement: str, count: int = 1) -> Callable[[Path], object]:
    """The language model's XML has something else where a pattern matches."""

    def write(folder: Path) -> None:
        path = folder / f"{LANGUAGE}.xml"
        changed, number = re.subn(pattern, replacement, path.read_text(), count=count)
        assert number, pattern
        path.write_text(changed)

    return write


def proto(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = folder / "decoder_model_merged.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return write


def external(key: str, value: str) -> Callable[[Path], object]:
    """A weight of the language model lies elsewhere."""

    def change(model: onnx.ModelProto) -> None:
        weight = next(item for item in model.graph.initializer if item.external_data)
        for entry in weight.external_data:
            if entry.key == key:
                entry.value = value

    return proto(change)


def outside(name: str) -> Callable[[Path], object]:
    """A file is a link to one beside the folder."""

    def write(folder: Path) -> None:
        place = folder.parent / f"{folder.name}-outside"
        (folder / name).rename(place)
        (folder / name).symlink_to(place)

    return write


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return write


def swapped(folder: Path) -> None:
    """Vision encoder and language model have each other's files."""
    for suffix in (".xml", ".bin"):
        one, other, between = (folder / f"{stem}{suffix}" for stem in (LANGUAGE, VISION, "between"))
        one.rename(between)
        other.rename(one)
        between.rename(other)


BOMB = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"

CHANGED = [
    # The manifest.
    Changed("a family that is none", manifest(lambda content: content.update(family="os")), "family"),
    Changed("a family that is a module", manifest(lambda content: content.update(family="../os:system")), "family"),
    Changed("a target that is none", manifest(lambda content: content.update(target="shell")), "target"),
    Changed("another target", manifest(lambda content: content.update(target="onnx")), "target"),
    Changed("no components", manifest(lambda content: content.update(components=[])), "component"),
    Changed("a component twice", manifest(lambda content: content["components"].append(content["components"][0])), "twice"),
    Changed("a component that no family has", component(name="shell"), "shell"),
    Changed("a format that is none", component(format="pickle"), "pickle"),
    Changed("no files", component(files=[]), ""),
    Changed("a path that leads out", file(path="../outside.bin"), "path"),
    Changed("a path that is absolute", file(path="/etc/passwd"), "path"),
    Changed("a path of Windows", file(path="C:\\Windows\\win.ini"), "path"),
    Changed("a path with a null byte", file(path="a\0b"), ""),
    Changed("a path that is the folder", file(path="."), ""),
    Changed("a file of negative size", file(size=-1), "size", rehashed=False),
    Changed("a hash that is none", file(sha256="0"), "sha256", rehashed=False),
    Changed("ports that the graph does not have", component(inputs=[]), "the manifest says 0"),
    Changed("weights that the graph does not have", component(weights={"int2": 10}), "int2"),
    Changed("blocks that the graph does not have", component(blocks={"layers.99": "0" * 8}), "layers.99"),
    Changed("no blocks", component(blocks={}), "block"),
    Changed("a list", text(MANIFEST_NAME, "[]"), "not a manifest"),
    Changed("nested deeply", text(MANIFEST_NAME, "[" * 200_000), "manifest"),
    Changed("names that move the cursor", component(name="\x1b[2J\x1b]0;owned\x07"), ""),
    # Files beside it.
    Changed("a config that is a list", text("config.json", "[]"), "config.json"),
    Changed("a config of another family", settings("config.json", model_type="mllama"), ""),
    Changed("a config with code", settings("config.json", auto_map={"AutoConfig": "evil.Config"}), "", runs=True),
    Changed("a config without layers", settings("config.json", text_config={}), ""),
    Changed("a processor that is code", settings("processor_config.json", auto_map={"AutoProcessor": "evil.P"}), "", runs=True),
    Changed("a processor class that is a module", settings("processor_config.json", processor_class="os.system"), ""),
    Changed("a tokenizer that is cut", text("tokenizer.json", '{"version": "1.0", "model": {'), ""),
    Changed("a tokenizer of binary", text("tokenizer.json", bytes(range(256))), ""),
    Changed("a template that reaches for Python", text("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), ""),
    Changed("a template that is cut", text("chat_template.jinja", "{% for m in"), ""),
    Changed("a generation config that is a list", text("generation_config.json", "[]"), ""),
    Changed("an end token that is text", settings("generation_config.json", eos_token_id="stop"), ""),
    Changed("weights that are a link that leads out", outside(f"{LANGUAGE}.bin"), ""),
    Changed("a pipe for weights", replaced(f"{LANGUAGE}.bin", os.mkfifo), f"{LANGUAGE}.bin"),
    Changed("a pipe for a tokenizer", replaced("tokenizer.json", os.mkfifo), "tokenizer.json"),
    Changed("a module beside it", text("evil.py", "raise SystemExit"), "evil.py", runs=True),
    Changed("a pickle beside it", text("pytorch_model.bin", b"\x80\x04."), "pytorch_model.bin", runs=True),
    # OpenVINO's graphs.
    Changed("each other's graphs", swapped, "the manifest says"),
    Changed("no weights", text(f"{LANGUAGE}.bin", b""), ""),
    Changed("an XML that is cut", text(f"{LANGUAGE}.xml", "<net><layers>"), ""),
    Changed("an XML of entities", lambda folder: text(f"{LANGUAGE}.xml", f"{BOMB}]><net>&j;</net>")(folder), ""),
    Changed("an XML that reads a file", text(f"{LANGUAGE}.xml", '<!DOCTYPE n [<!ENTITY x SYSTEM "file:///etc/passwd">]><net>&x;</net>'), ""),
    Changed("a constant beyond the weights", graph(r'offset="\d+" size="(\d{3,})"', r'offset="99999999999" size="\1"'), ""),
    Changed("a constant before the weights", graph(r'offset="\d+" size="(\d{3,})"', r'offset="-64" size="\1"'), ""),
    Changed("a constant of 9 exabytes", graph(r'size="\d{3,}"', 'size="9223372036854775807"'), ""),
    Changed("an operation that is none", graph(r'type="MatMul"', 'type="Shell"'), ""),
    Changed("an operation of another library", graph(r'version="opset1"', 'version="evil"'), ""),
    Changed("an edge to nowhere", graph(r'to-layer="\d+"', 'to-layer="99999"'), ""),
    Changed("a circle", graph(r'from-layer="(\d+)" from-port="(\d+)" to-layer="\d+"', r'from-layer="\1" from-port="\2" to-layer="\1"', 50), ""),
    # ONNX graphs.
    Changed("ONNX of nothing", text("decoder_model_merged.onnx", b""), "decoder_model_merged", "onnx"),
    Changed("ONNX of binary", text("decoder_model_merged.onnx", bytes(range(256))), "decoder_model_merged", "onnx"),
    Changed("ONNX with weights beside the folder", external("location", "../outside.data"), "outside.data", "onnx"),
    Changed("ONNX with weights of the system", external("location", "/etc/passwd"), "/etc/passwd", "onnx"),
    Changed("ONNX with weights in another file", external("location", "config.json"), "config.json", "onnx"),
    Changed("ONNX with weights beyond the file", external("offset", "99999999999"), "decoder_model_merged", "onnx"),
    Changed("ONNX with weights before the file", external("offset", "-1"), "decoder_model_merged", "onnx"),
    Changed("ONNX with an operation of another library", proto(lambda model: setattr(model.graph.node[3], "domain", "evil")), "", "onnx"),
    Changed("ONNX with an input that nothing makes", proto(lambda model: model.graph.node[9].input.insert(0, "nowhere")), "", "onnx"),
]  # fmt: skip
