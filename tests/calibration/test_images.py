"""Images of every mode that Pillow has: a processor makes of them what transformers makes of the opened file."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.Image import MODES

from calibration.sources import Sample, SampleSet, open_image
from calibration.sources.images import StoredImage, for_processor, on_white
from manifests.errors import BadInputError
from tests.checkpoints import CLASSES, write_checkpoint
from tests.prompts import process
from vlmconvert import load_processor
from vlmconvert.families import demo_checkpoint

SIZE = (45, 33)
DEEP = {"F", "I", "I;16", "I;16B", "I;16L", "I;16N"}
# In which a mode is a file's, and its pixels survive.
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "CMYK", "F", "I", "I;16", "I;16B", "L", "LA", "LAB", "P", "PA", "RGB", "RGBA"),
    "PPM": ("1", "F", "I", "L", "RGB"),
}


def pixels(channels: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], channels), dtype=np.uint8)
    return np.where(values < 60, 0, np.where(values > 200, 255, values)).squeeze()


def picture(mode: str) -> Image.Image:
    """Noise, with pixels that are transparent, opaque and in between where the mode can say that."""
    match mode:
        case "1":
            return Image.fromarray(pixels(1)).convert("1")
        case "P" | "PA":
            image = Image.frombytes(mode, SIZE, pixels(len(mode)).tobytes())
            image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
            return image
        case _ if mode in DEEP:
            deep = pixels(1).astype(np.int64) * 256 + pixels(1, 2)
            kind = {"F": "<f4", "I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
            return Image.frombytes(mode, SIZE, deep.astype(kind).tobytes())
        case "La" | "RGBa":
            return picture(mode.upper()).convert(mode)
    return Image.frombytes(mode, SIZE, pixels(len(Image.new(mode, (1, 1)).getbands())).tobytes())


def keyed(mode: str) -> Image.Image:
    """With a colour, or with palette entries, that are transparent."""
    image = picture(mode.split("-")[0])
    first = image.getpixel((0, 0))
    image.info["transparency"] = bytes([0, 128] * 128) if mode == "P-bytes" else first
    return image


IMAGES = {mode: picture(mode) for mode in MODES} | {
    f"{mode}, transparent": keyed(mode) for mode in ("1", "L", "P", "P-bytes", "RGB")
}


@pytest.fixture(scope="session")
def processors(tmp_path_factory):
    """Each family's processor."""
    folders = {name: demo_checkpoint(name) for name in ("mllama", "llava")}
    for family in ("llava", "llava-next", "llava-next-video"):
        for vision in ("clip", "siglip"):
            folders[f"{family}, {vision}"] = write_checkpoint(
                tmp_path_factory.mktemp("checkpoint") / "random", family, vision=vision
            )
    return {name: load_processor(folder) for name, folder in folders.items()}


def values(processor, image: Image.Image) -> dict[str, np.ndarray]:
    """Everything that comes of an image, and of the frames of a video."""
    token = getattr(processor, "image_token", "<|image|>")
    found = process(processor, [f"{token} What is this?"], [[image]])
    if getattr(processor, "video_processor", None) is not None:
        found |= process(processor, [f"{processor.video_token} What happens?"], (), [[[image, image]]])
        assert found["pixel_values_videos"].ndim == 5
    return found


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in {*DEEP, "La"}])
def test_a_processor_makes_of_an_image_what_it_makes_of_the_opened_one(processors, name):
    given = for_processor(IMAGES[name])
    assert given.mode in ("RGB", "RGBA")
    for processor in processors.values():
        assert_equal(values(processor, given), values(processor, IMAGES[name]))
        assert_equal(values(processor, on_white(given)), values(processor, IMAGES[name]))


def test_every_family_is_asked(processors):
    assert {name.split(",")[0] for name in processors} == {"mllama", *CLASSES}
    videos = [
        name for name, processor in processors.items() if "pixel_values_videos" in values(processor, IMAGES["RGB"])
    ]
    assert videos == ["llava-next-video, clip", "llava-next-video, siglip"]


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in FORMATS.items() for mode in modes])
def test_files_of_every_mode(processors, tmp_path, kind, mode):
    path = tmp_path / f"image.{kind.lower()}"
    IMAGES[mode].save(path, kind)
    given = open_image(path)
    assert given.mode == ("RGBA" if "A" in mode and mode != "LAB" else "RGB")
    with Image.open(path) as opened:
        expected = grey(opened) if opened.mode in DEEP else opened
        for processor in processors.values():
            assert_equal(values(processor, given), values(processor, expected))


@pytest.mark.parametrize("name", ["1", "L", "P", "P-bytes", "RGB"])
def test_transparent_colours_of_a_file(processors, tmp_path, name):
    image = keyed(name)
    image.save(tmp_path / "image.png", transparency=image.info["transparency"])
    given = open_image(tmp_path / "image.png")
    assert given.mode == "RGBA"
    with Image.open(tmp_path / "image.png") as opened:
        assert "A" not in opened.mode
        for processor in processors.values():
            assert_equal(values(processor, given), values(processor, opened))


def grey(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits."""
    return Image.fromarray((np.asarray(image).astype(np.int64) // 256).astype(np.uint8))


@pytest.mark.parametrize("mode", sorted(DEEP))
def test_16_bits_are_scaled(mode):
    given = for_processor(IMAGES[mode])
    np.testing.assert_array_equal(np.asarray(given), np.asarray(grey(IMAGES[mode]).convert("RGB")))
    assert len(np.unique(given)) > 100


def test_16_bits_are_those_of_a_colour_image_of_16_bits(tmp_path):
    """Pillow itself takes the upper 8 bits of those."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deep = np.asarray(IMAGES["I;16"]).astype(">u2")
    for color, channels in ((0, 1), (2, 3)):
        rows = np.repeat(deep[:, :, None], channels, axis=2)
        data = b"".join(b"\0" + row.tobytes() for row in rows)
        header = struct.pack(">IIBBBBB", *SIZE, 16, color, 0, 0, 0)
        parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
        (tmp_path / f"{channels}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert Image.open(tmp_path / "1.png").mode == "I;16"
    assert open_image(tmp_path / "1.png").tobytes() == open_image(tmp_path / "3.png").tobytes()


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_32_bits_are_scaled_by_what_white_may_be(mode, white):
    levels = np.arange(256, dtype=np.float64).reshape(16, 16)
    deep = (levels * ((white + 1) // 256)).astype("<i4" if mode == "I" else "<f4")
    given = for_processor(Image.frombytes(mode, (16, 16), deep.tobytes()))
    np.testing.assert_array_equal(np.asarray(given)[:, :, 0], levels)


def test_floats_up_to_1_and_what_is_no_number():
    levels = np.arange(256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(for_processor(Image.fromarray(levels / 255)))[:, :, 0], levels)
    odd = np.array([[np.nan, np.inf, -np.inf, -3, 0.5, 1]], np.float32)
    assert np.asarray(for_processor(Image.fromarray(odd)))[0, :, 0].tolist() == [0, 0, 0, 0, 128, 255]


def test_one_transparent_value_of_16_bits(tmp_path):
    deep = np.array([[256, 257, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "image.png", transparency=257)
    given = open_image(tmp_path / "image.png")
    assert np.asarray(given)[0].tolist() == [[1, 1, 1, 255], [1, 1, 1, 0], [255, 255, 255, 255]]


def test_premultiplied_grey_is_transparent_too(processors):
    given = for_processor(IMAGES["La"])
    assert given.mode == "RGBA"
    for processor in processors.values():
        assert_equal(values(processor, given), values(processor, IMAGES["La"].convert("LA")))


def test_transparency_is_put_on_the_processors_own_background(processors):
    clear = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    for processor in processors.values():
        assert_equal(values(processor, for_processor(clear)), values(processor, Image.new("RGB", (56, 56), "white")))


@pytest.mark.parametrize("do_convert_rgb", [False, None])
def test_a_processor_that_does_not_convert_gets_three_channels(tmp_path, do_convert_rgb):
    processor = load_processor(write_checkpoint(tmp_path / "checkpoint"))
    image = for_processor(IMAGES["RGBA"])
    expected = values(processor, image)
    processor.image_processor.do_convert_rgb = do_convert_rgb
    assert_equal(values(processor, image), expected)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in {*DEEP, "La", "LA", "PA", "RGBA"}])
def test_digests_of_images_without_transparency_are_those_of_rgb(mode):
    """Conversions in a store, and manifests, hold digests."""
    sample = Sample("", (for_processor(IMAGES[mode]),), (("Which?", "red"),))
    expected = replace(sample, pictures=(IMAGES[mode].convert("RGB"),))
    assert SampleSet("", None, 0, (sample,)).digest == SampleSet("", None, 0, (expected,)).digest


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_opaque_images_are_rgb(mode):
    image = IMAGES[mode].copy()
    image.putalpha(255)
    assert for_processor(image).mode == "RGB"
    assert for_processor(image).tobytes() == image.convert("RGB").tobytes()


def test_digests_see_transparency():
    images = [IMAGES["RGBA"], IMAGES["RGBA"].convert("RGB"), on_white(IMAGES["RGBA"])]
    digests = {SampleSet("", None, 0, (Sample("", (image,), (("", ""),)),)).digest for image in images}
    assert len(digests) == 3


@pytest.mark.parametrize("mode", sorted({"I;16", "I;16B", "LA", "P", "RGBA"}))
def test_turned_images_keep_what_they_are(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    IMAGES[mode].save(tmp_path / "turned.tiff", exif=exif)
    IMAGES[mode].save(tmp_path / "straight.tiff")
    straight = open_image(tmp_path / "straight.tiff")
    turned = open_image(tmp_path / "turned.tiff")
    assert turned.mode == straight.mode
    assert turned.tobytes() == straight.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_transparent_images_are_scaled_for_calibration():
    sample = Sample("", (for_processor(IMAGES["RGBA"]),), (("", ""),))
    (fitted,) = SampleSet("", None, 0, (sample,)).with_sizes([(20, 20)]).samples
    assert fitted.images[0].mode == "RGBA"
    assert fitted.images[0].tobytes() == ImageOps.fit(IMAGES["RGBA"], (20, 20)).tobytes()


def test_a_broken_transparent_image_is_one_sentence():
    stream = BytesIO()
    IMAGES["RGBA"].save(stream, "PNG")
    half = stream.getvalue()[:500]
    with pytest.raises(BadInputError, match="here cannot be read .*: use another file"):
        StoredImage("here", lambda: BytesIO(half)).read()


def test_what_was_opened_is_not_changed():
    for name, image in IMAGES.items():
        before = (image.mode, image.tobytes(), dict(image.info))
        for_processor(image)
        assert (image.mode, image.tobytes(), dict(image.info)) == before, name
