"""Images that are decoded when they are asked for, and refused with a sentence if they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from manifests.errors import BadInputError

__all__ = ["StoredImage", "image_in", "open_image"]


@dataclass(frozen=True)
class StoredImage:
    """An image in a file, or in a part of one.

    Attributes:
        where: what an error calls it, with the file and line that name it.
        open: gives its encoded bytes from the start.
    """

    where: str
    open: Callable[[], IO[bytes]]

    @classmethod
    def in_file(cls, path: Path, where: str = "") -> StoredImage:
        """The image in a file, which is named at `where` in another file."""
        return cls(f"{where}: image {path}" if where else f"image {path}", partial(_open, path))

    def read(self) -> Image.Image:
        """The image, upright and as RGB.

        Raises:
            BadInputError: if it is missing, no image, broken or a decompression bomb.
        """
        with self._opened() as image:
            return ImageOps.exif_transpose(image).convert("RGB")

    def check(self) -> None:
        """Read the header only.

        Raises:
            BadInputError: as `read`, but not for pixels that are broken.
        """
        with self._opened():
            pass

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with self.open() as stream, Image.open(stream) as image:
                yield image
        except FileNotFoundError:
            raise BadInputError(f"{self.where} does not exist") from None
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            raise BadInputError(f"{self.where} cannot be read ({error}): use another file") from error


def open_image(path: Path) -> Image.Image:
    """Read an image upright and as RGB.

    Raises:
        BadInputError: if the file is missing, no image, broken or a decompression bomb.
    """
    return StoredImage.in_file(path).read()


def image_in(folder: Path, name: str, where: str) -> StoredImage:
    """The image that a file names, at `where` in it, relative to `folder`.

    Raises:
        BadInputError: if the name leads out of the folder.
    """
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        inside = False
    if not inside:
        raise BadInputError(f"{where}: {name!r} lies outside the folder {folder}: move it inside")
    return StoredImage.in_file(path, where)


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")
