"""Images that are decoded when they are needed; an image that cannot be decoded is an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from manifests.errors import BadInputError
from manifests.files import open_file

__all__ = ["StoredImage", "for_processor", "image_in", "on_white", "open_image"]

# Formats that Pillow decodes by itself: for others it starts programs, as Ghostscript for EPS, or asks plugins.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Possible values of white in 32-bit images, for which Pillow does not define it.
_WHITES = (2**8 - 1, 2**16 - 1, 2**31 - 1)


@dataclass(frozen=True)
class StoredImage:
    """An encoded image in a file, or in a part of a file.

    Attributes:
        where: name of the image for error messages, with the file and line that mention it.
        open: opens a stream of the encoded bytes.
    """

    where: str
    open: Callable[[], IO[bytes]]

    @classmethod
    def in_file(cls, path: Path, where: str = "") -> StoredImage:
        """The image in the file `path`, which another file mentions at `where`."""
        return cls(f"{where}: image {path}" if where else f"image {path}", partial(open_file, path))

    def read(self) -> Image.Image:
        """Decode the image, and prepare it by `for_processor`.

        Raises:
            BadInputError: if the file is missing, not an image of a known format, broken, or has too many pixels.
        """
        with self._opened() as image:
            return for_processor(image)

    def check(self) -> None:
        """Read only the header of the image.

        Raises:
            BadInputError: as `read`, but not for broken pixels, which are not decoded.
        """
        with self._opened():
            pass

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with self.open() as stream, Image.open(stream, formats=_known_formats()) as image:
                # Pillow only warns of up to twice as many.
                if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels may be a decompression bomb: at most {Image.MAX_IMAGE_PIXELS} are read"
                    )
                yield image
        except FileNotFoundError:
            raise BadInputError(f"{self.where} does not exist: correct the path, or add the file") from None
        except Exception as error:  # Pillow's readers of broken files raise errors of any kind
            reason = str(error) or type(error).__name__
            raise BadInputError(f"{self.where} cannot be read ({reason}): use another file") from error


def open_image(path: Path) -> Image.Image:
    """Decode the image in a file, and prepare it by `for_processor`.

    Raises:
        BadInputError: as `StoredImage.read`.
    """
    return StoredImage.in_file(path).read()


def for_processor(image: Image.Image) -> Image.Image:
    """Turn an opened image upright and convert it to RGB or RGBA, from which a processor makes the same pixel values.

    Channels of more than 8 bits are scaled to 8 bits, because transformers' processors would clip them at 255.

    Returns:
        RGBA if a part of the image is transparent, since each processor has its own background for it; otherwise RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _in_8_bits(image)
    if image.mode == "La":  # Pillow converts premultiplied alpha only to LA
        image = image.convert("LA")
    # The condition is that of transformers.image_transforms.convert_to_rgb.
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return image.convert("RGB") if image.getchannel("A").getextrema() == (255, 255) else image


def on_white(image: Image.Image) -> Image.Image:
    """An image of `for_processor` as RGB on white, as transformers' processors see it and as it looks on a web page."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # Pillow may be built without one


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale an image with one channel of 16 or 32 bits to mode L, or to LA if one of its values stands for transparent.

    16-bit values lose their lower 8 bits, as when Pillow reads 16-bit colours. 32-bit images do not define white: it is
    taken to be the smallest of 1 (for floats), 255, 65535 and 2147483647 that no pixel exceeds.
    """
    values: np.ndarray = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    brightest = values.max(initial=0)
    if image.mode == "F" and brightest <= 1:
        scaled = np.round(255 * values)
    elif image.mode.startswith("I;16"):
        scaled = values / 256
    else:
        white = next((white for white in _WHITES if brightest <= white), _WHITES[-1])
        scaled = values * (256 / (white + 1))
    grey = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def image_in(folder: Path, name: str, where: str) -> StoredImage:
    """The image `name` in `folder`, which a file mentions at `where`.

    Raises:
        BadInputError: if the name leads out of the folder, or cannot be a file's.
    """
    path = folder / name
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links, a name that is too long
        raise BadInputError(f"{where}: {shown!r} cannot be the name of an image: correct it") from error
    if not inside:
        raise BadInputError(f"{where}: image {shown!r} lies outside the folder {folder}: move it into the folder")
    return StoredImage.in_file(path, where)
