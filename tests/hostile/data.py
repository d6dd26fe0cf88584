"""Broken and hostile images, and files of samples: what a bad disk, a mistake or a stranger may leave."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

__all__ = ["GOOD_IMAGES", "IMAGES", "SOURCES", "encoded"]

SIZE = (40, 30)
Write = Callable[[Path], object]


def encoded(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    """The bytes of an image."""
    stream = io.BytesIO()
    noise = Image.effect_noise(size, 90).convert(mode)
    noise.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG whose header says what it likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def resized(jpeg: bytes, size: int) -> bytes:
    """A JPEG whose header has another width and height."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", size, size) + jpeg[place + 4 :]


def tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF of one directory; entries are tag, type, count and value."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)


def text_bomb() -> bytes:
    """A PNG with a text of 200 MB in 200 kB."""
    return png(
        *SIZE, bytes(3 * SIZE[0] * SIZE[1] + SIZE[1]), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))
    )


def transparent(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "<script>alert(1)</script>")
    Image.new("P", SIZE).save(path, "PNG", transparency=0, pnginfo=info)


class Opened:
    """A pickle that would leave a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", SIZE, (shade, 0, 0)) for shade in (0, 90, 180)]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    return stream.getvalue()


# Images that must be read, odd as they are.
GOOD_IMAGES: dict[str, bytes | Write] = {
    "1 x 1": encoded(size=(1, 1)),
    "1 x 3000": encoded(size=(1, 3000)),
    "3000 x 2": encoded(size=(3000, 2)),
    "CMYK": encoded("JPEG", "CMYK"),
    "an animated GIF": animated("GIF"),
    "an animated WebP": animated("WEBP"),
    "a progressive JPEG": encoded("JPEG", progressive=True),
    "bytes after the end": encoded() + b"\0" * 1000,
    "an EXIF orientation that is none": encoded(
        "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"
    ),
    "EXIF that is none": encoded("JPEG", exif=b"Exif\0\0" + b"\xff" * 40),
    "a palette with transparency": transparent,
    "1 bit": encoded(mode="1"),
}

_CUT = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")}

# Images that must be refused.
IMAGES: dict[str, bytes | Write] = {
    "empty": b"",
    "text": b"This is no image.",
    "HTML": b"<!DOCTYPE html><title>404</title>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch unpickled) (w) file\n%%EOF\n",
    "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
    "an archive": b"PK\x03\x04" + bytes(60),
    "a pickle": pickle.dumps(Opened()),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    "an icon": b"\0\0\x01\0\x01\0" + bytes(16),
    "PNG of 30000 x 30000": png(30_000, 30_000),
    "PNG of 12000 x 12000": png(12_000, 12_000),
    "PNG of 2 billion pixels a side": png(2**31 - 1, 2**31 - 1),
    "PNG without width": png(0, 30),
    "PNG without data": png(*SIZE),
    "PNG with a wrong checksum": encoded()[:40] + b"\xff" + encoded()[41:],
    "PNG with a text of 200 MB": text_bomb(),
    "PNG with a chunk of 4 GB": encoded()[:33] + b"\xff\xff\xff\xffIDAT",
    "GIF of 65535 x 65535": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
    "JPEG of 65500 x 65500": resized(encoded("JPEG"), 65_500),
    "JPEG without size": resized(encoded("JPEG"), 0),
    "JPEG without tables": b"\xff\xd8\xff\xda\0\x02\xff\xd9",
    "TIFF without tags": tiff(),
    "TIFF that follows itself": tiff((256, 4, 1, 9), following=8),
    "TIFF with 4 billion strips": tiff(
        (256, 4, 1, 40), (257, 4, 1, 30), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 2**32 - 1, 8)
    ),
    "TIFF with strips after the end": tiff(
        (256, 4, 1, 40), (257, 4, 1, 30), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 2**31)
    ),
    "BMP of 4 GB": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    "WebP of nothing": b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(20),
    "AVIF of nothing": bytes(3) + b"\x1cftypavif" + bytes(16),
    "JPEG 2000 of nothing": bytes(3) + b"\x0cjP  \r\n\x87\n" + bytes(40),
    "PPM of a quadrillion pixels": b"P6 99999999 99999999 255\n",
    "PPM with words for numbers": b"P3 forty thirty 255\n",
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere.png"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a gigabyte of nothing": lambda path: os.truncate(path.touch() or path, 1 << 30),
    **{f"{kind}, cut in the header": data[:20] for kind, data in _CUT.items()},
    **{f"{kind}, cut in the middle": data[: len(data) // 2] for kind, data in _CUT.items()},
}


def jsonl(line: bytes | str) -> Callable[[Path], str]:
    """A folder with a good image and one line."""

    def write(folder: Path) -> str:
        (folder / "0.png").write_bytes(encoded())
        (folder / "metadata.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
        return str(folder)

    return write


def row(**fields: Any) -> Callable[[Path], str]:
    return jsonl(json.dumps({"file_name": "0.png", "caption": "noise"} | fields))


def tsv(images: bytes, texts: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "images.tsv").write_bytes(images)
        (folder / "texts.tsv").write_bytes(texts)
        return f"{folder / 'images.tsv'},{folder / 'texts.tsv'}"

    return write


def coco(document: Any, image: str = "000000000001.jpg") -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / image).write_bytes(encoded("JPEG"))
        path = folder / "captions.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return str(path)

    return write


def captions(image: Any, annotation: Any) -> Callable[[Path], str]:
    whole = {"id": 1, "file_name": "000000000001.jpg"}, {"image_id": 1, "caption": "noise"}
    return coco(
        {
            "images": [whole[0] | image if isinstance(image, dict) else image],
            "annotations": [whole[1] | annotation if isinstance(annotation, dict) else annotation],
        }
    )


def asked(question: Any) -> Callable[[Path], str]:
    whole = {"question_id": 1, "image_id": 1, "question": "What?"}
    return coco({"questions": [whole | question if isinstance(question, dict) else question]})


def special(name: str, make: Write, rest: str = "") -> Callable[[Path], str]:
    """A folder with one file that is none."""

    def write(folder: Path) -> str:
        (folder / "0.png").write_bytes(encoded())
        make(folder / name)
        return str(folder / rest) if rest else str(folder)

    return write


def outside(folder: Path) -> str:
    """An image beside the folder, that a link in it leads to."""
    place = folder / "data"
    place.mkdir()
    (folder / "private.png").write_bytes(encoded())
    (place / "0.png").symlink_to(folder / "private.png")
    return str(place)


_IMAGE = b"a\t" + base64.b64encode(encoded())
_DEEP = "[" * 5000 + '"x"' + "]" * 5000

# Sources of samples that must be refused: name -> writes it to a folder, and returns the source.
SOURCES: dict[str, Callable[[Path], str]] = {
    "no such folder": lambda folder: f"{folder}/nowhere",
    "an empty folder": str,
    "an empty folder with a name of markup": lambda folder: str((folder / "<b>").mkdir() or folder / "<b>"),
    "an image that leads out": outside,
    "metadata that is empty": lambda folder: (jsonl(b"")(folder), (folder / "0.png").unlink())[0],
    "metadata that is a folder": special("metadata.jsonl", Path.mkdir),
    "metadata that is a pipe": special("metadata.jsonl", os.mkfifo),
    "metadata that is a gigabyte": special("metadata.jsonl", lambda path: os.truncate(path.touch() or path, 1 << 30)),
    "a caption that is a pipe": special("0.txt", os.mkfifo),
    "a caption that is a folder": special("0.txt", Path.mkdir),
    "a caption that is no UTF-8": special("0.txt", lambda path: path.write_bytes(b"caf\xe9")),
    "a caption of a gigabyte": special("0.txt", lambda path: os.truncate(path.touch() or path, 1 << 30)),
    "a line that is cut": jsonl('{"file_name": "0.png", "capt'),
    "a line that is a list": jsonl("[1, 2]"),
    "a line that is null": jsonl("null"),
    "a line of UTF-16": jsonl('{"file_name": "0.png", "caption": "x"}'.encode("utf-16")[:-1]),
    "a line of no UTF-8": jsonl(b'{"file_name": "0.png", "caption": "\xff"}'),
    "a line of binary": jsonl(bytes(range(256))),
    "a line that is nested deeply": jsonl('{"file_name": "0.png", "caption": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    "captions that are nested deeply": jsonl(f'{{"file_name": "0.png", "captions": {_DEEP}}}'),
    "a number of 10000 digits": jsonl('{"file_name": "0.png", "caption": ' + "9" * 10_000 + "}"),
    "no file name": jsonl('{"caption": "x"}'),
    "a file name that is a number": row(file_name=7),
    "a file name that is a list": row(file_name=["0.png"]),
    "an empty file name": row(file_name=""),
    "a file name that is the folder": row(file_name="."),
    "a file name that leads out": row(file_name="../../0.png"),
    "a file name that is absolute": row(file_name="/etc/hostname"),
    "a file name with a null byte": row(file_name="0.png\0"),
    "a file name with half a surrogate": row(file_name="\ud800.png"),
    "a file name of 5000 characters": row(file_name="x" * 5000),
    "a file name of another computer": row(file_name="C:\\images\\0.png"),
    "a file name that is an address": row(file_name="http://192.0.2.1/0.png"),
    "an image that is not there": row(file_name="1.png"),
    "an image that is no image": row(file_name="metadata.jsonl"),
    "no caption": row(caption=None),
    "an empty caption": row(caption=""),
    "a caption that is a number": row(caption=3),
    "a caption of half a surrogate": row(caption="\ud800"),
    "a question of half a surrogate": row(question="\udfff"),
    "answers without text": row(caption=None, question="What?", answers=[{"id": 1}]),
    "TSV: one file": lambda folder: tsv(_IMAGE, b"")(folder).partition(",")[0],
    "TSV: nothing": tsv(b"", b""),
    "TSV: no tab": tsv(_IMAGE, b'a "x"'),
    "TSV: no key": tsv(_IMAGE, b'\t"x"'),
    "TSV: no JSON": tsv(_IMAGE, b"a\tx"),
    "TSV: an unknown image": tsv(_IMAGE, b'b\t"x"'),
    "TSV: an image twice": tsv(_IMAGE + b"\n" + _IMAGE, b'a\t"x"'),
    "TSV: no base64": tsv(b"a\t<>", b'a\t"x"'),
    "TSV: base64 of no image": tsv(b"a\t" + base64.b64encode(b"x"), b'a\t"x"'),
    "TSV: a bomb": tsv(b"a\t" + base64.b64encode(png(30_000, 30_000)), b'a\t"x"'),
    "TSV: captions that are nested deeply": tsv(_IMAGE, b"a\t" + _DEEP.encode()),
    "TSV: a key of half a surrogate": tsv(b"\xed\xa0\x80\tx", b'a\t"x"'),
    "TSV: a line of a gigabyte": lambda folder: (
        tsv(b"", b'a\t"x"')(folder), os.truncate(folder / "images.tsv", 1 << 30))[0],
    "TSV: a pipe": lambda folder: (tsv(b"", b'a\t"x"')(folder), (folder / "images.tsv").unlink(), os.mkfifo(folder / "images.tsv"))[0],
    "COCO: nothing": coco(""),
    "COCO: a list": coco([]),
    "COCO: an empty object": coco({}),
    "COCO: nested deeply": coco("[" * 200_000),
    "COCO: a gigabyte": lambda folder: (coco("")(folder), os.truncate(folder / "captions.json", 1 << 30))[0],
    "COCO: a pipe": lambda folder: (coco("")(folder), (folder / "captions.json").unlink(), os.mkfifo(folder / "captions.json"))[0],
    "COCO: images that are an object": coco({"images": {}, "annotations": []}),
    "COCO: no captions": coco({"images": [], "annotations": []}),
    "COCO: an image that is a text": captions("x", {}),
    "COCO: an id that is a list": captions({"id": [1]}, {}),
    "COCO: an id that is infinite": captions({"id": float("inf")}, {}),
    "COCO: a file name that leads out": captions({"file_name": "../0.png"}, {}),
    "COCO: a file name that is absolute": captions({"file_name": "/etc/hostname"}, {}),
    "COCO: a file name that is no text": captions({"file_name": {"a": 1}}, {}),
    "COCO: a file name with a null byte": captions({"file_name": "\0"}, {}),
    "COCO: an image that is no image": captions({"file_name": "captions.json"}, {}),
    "COCO: an annotation that is null": captions({}, None),
    "COCO: an unknown image": captions({}, {"image_id": 2}),
    "COCO: a caption that is a list": captions({}, {"caption": ["x"]}),
    "COCO: a caption of half a surrogate": captions({}, {"caption": "\ud800"}),
    "COCO: questions that are a text": coco({"questions": "x"}),
    "COCO: no questions": coco({"questions": []}),
    "COCO: a question that is a number": asked(1),
    "COCO: a question without text": asked({"question": ""}),
    "COCO: a question of half a surrogate": asked({"question": "\ud800"}),
    "COCO: a question id of another kind": asked({"question_id": "one"}),
    "COCO: an image id that is huge": asked({"image_id": 10**30}),
    "COCO: an image id that is negative": asked({"image_id": -1}),
}  # fmt: skip
