"""What is fuzzed: readers that take bytes from anywhere, and may refuse them in one way only, by `BadInputError`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calibration.sources import load_samples, open_image
from manifests.errors import BadInputError
from manifests.io import read_manifest_file
from passes.base import parse_pass
from passes.header import read_header
from tests.hostile.data import GOOD_IMAGES, encoded
from vlmconvert.recipes.recipe import read_recipe

__all__ = ["TARGETS"]


@contextmanager
def _file(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        with suppress(BadInputError):
            yield path


def header(data: bytes) -> None:
    """The header of a safetensors file."""
    with _file("w.safetensors", data) as path:
        read_header(path.parent, path.name)


def manifest(data: bytes) -> None:
    """`manifest.json`."""
    with _file("manifest.json", data) as path:
        read_manifest_file(path)


def recipe(data: bytes) -> None:
    """A recipe in TOML."""
    with _file("recipe.toml", data) as path:
        read_recipe(path)


def pass_line(data: bytes) -> None:
    """The line of a pass."""
    with suppress(BadInputError):
        parse_pass(data.decode("utf-8", "replace"))


def image(data: bytes) -> None:
    """An image of any format."""
    with _file("image", data) as path:
        open_image(path)


def metadata(data: bytes) -> None:
    """`metadata.jsonl` of a folder of images."""
    with _file("metadata.jsonl", data) as path:
        (path.parent / "0.png").write_bytes(_PNG)
        _ = [sample.images[0] for sample in load_samples(str(path.parent), 2).samples]


def tsv(data: bytes) -> None:
    """A TSV file of questions."""
    with _file("texts.tsv", data) as path:
        (path.parent / "images.tsv").write_bytes(b"a\tiVBORw0KGgo=\n")
        load_samples(f"{path.parent / 'images.tsv'},{path}", 2)


def coco(data: bytes) -> None:
    """COCO captions."""
    with _file("captions.json", data) as path:
        (path.parent / "0.png").write_bytes(_PNG)
        load_samples(str(path), 2)


_PNG = encoded(size=(2, 2))
_CAPTIONS = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "noise"}]}
_HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"format":"pt"}}'

# Name -> what is fuzzed, and inputs to start from.
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "header": (header, [len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(4)]),
    "manifest": (manifest, [b'{"schema_version": "1.3", "name": "x", "components": [], "environment": {}}']),
    "recipe": (recipe, [b'target = "openvino"\n[components.language_model]\npasses = ["split"]\nlayers = {"*" = "int8"}\n']),
    "pass-line": (pass_line, [b"split", b"compress-int4{group_size=64,symmetric=false,ratio=1.0,all_layers=false}"]),
    "image": (image, [encoded(kind, size=(4, 4)) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")]
              + [data for data in GOOD_IMAGES.values() if isinstance(data, bytes) and len(data) < 2000]),
    "metadata": (metadata, [b'{"file_name": "0.png", "caption": "noise"}\n{"file_name": "0.png", "question": "?", "answers": ["x"]}\n']),
    "tsv": (tsv, [b'a\t[{"question": "Which?", "answers": [{"answer": "red"}], "question_id": 5}]\n', b'a\t"A bus."\n']),
    "coco": (coco, [json.dumps(_CAPTIONS).encode(), b'{"questions": [{"question_id": 1, "image_id": 0, "question": "?"}]}']),
}  # fmt: skip
