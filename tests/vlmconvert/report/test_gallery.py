"""Thumbnails of images that a page cannot show as they are."""

from __future__ import annotations

import base64
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vlmconvert.report.gallery import thumbnail


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_transparent_image_is_shown_on_white_as_the_models_saw_it(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 4), dtype=np.uint8)
    pixels[:150, :, 3], pixels[150:, :, 3] = 0, 255
    if kind == "PNG":  # a drawing is small, and kept as it is
        pixels[:, :, :3] = 40
    path = tmp_path / "evaluation" / "images" / "3.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    found = thumbnail(SimpleNamespace(folder=tmp_path), 3, None)
    head, _, data = found.partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    shown = Image.open(BytesIO(base64.b64decode(data)))
    assert (shown.format, shown.mode) == (kind, "RGB")
    assert np.asarray(shown)[:100].min() >= 250
    assert np.asarray(shown)[200:].min() < 200
