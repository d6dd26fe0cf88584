"""Broken and hostile images, and files of samples, are refused in one sentence; odd ones are read."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from calibration.sources import load_samples, open_image
from manifests.errors import BadInputError
from tests.conftest import vlmconvert
from tests.hostile.data import GOOD_IMAGES, IMAGES, SOURCES
from tests.hostile.test_checkpoints import sentence

pytestmark = pytest.mark.slow


def put(content: bytes | Callable[[Path], object], path: Path) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return path


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_refused(name, tmp_path, elsewhere):
    before = set(tmp_path.iterdir())
    path = put(IMAGES[name], tmp_path / "image.png")
    with pytest.raises(
        BadInputError, match=r"image .*image\.png (cannot be read \(.+\): use another file|does not exist)"
    ):
        open_image(path)
    assert set(tmp_path.iterdir()) - before == {path}


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_an_odd_image_is_read(name, tmp_path):
    image = open_image(put(GOOD_IMAGES[name], tmp_path / "image.png"))
    assert image.mode in ("RGB", "RGBA")
    assert image.getextrema()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_refused(name, tmp_path, elsewhere):
    source = SOURCES[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInputError, match=r": \w+ .*"):
        [sample.images[0] for sample in load_samples(source, 4).samples]
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_many():
    assert len(IMAGES) + len(GOOD_IMAGES) + len(SOURCES) > 140


@pytest.mark.parametrize(
    "name", ["a caption of a gigabyte", "a file name of 5000 characters", "COCO: a pipe", "TSV: a bomb"]
)
def test_the_command_line_refuses_it_before_the_work(name, tmp_path, elsewhere, store):
    (tmp_path / "data").mkdir()
    source = SOURCES[name](tmp_path / "data")
    options = ("--llm", "int4-awq", "--vision", "int8", "--calibration", source, "--samples", 4)
    result = vlmconvert("llava", *options, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2, result.output
    sentence(result.output)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_hostile_images_takes_little_time_and_memory(tmp_path):
    """All in one process, which no program that an image names is started by."""
    for number, content in enumerate((*IMAGES.values(), *GOOD_IMAGES.values())):
        put(content, tmp_path / f"{number}.png")
    program = """
import sys
from pathlib import Path
from calibration.sources import open_image
from manifests.errors import BadInputError
sys.addaudithook(lambda event, _: sys.exit(event) if event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect") else None)
for path in Path(sys.argv[1]).iterdir():
    try:
        open_image(path)
    except BadInputError:
        pass
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "unpickled").exists()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    assert after.ru_maxrss < 2 << 20  # kilobytes, of the largest child so far


def test_an_image_of_many_pixels_is_read_within_limits(tmp_path):
    """Below the limit for bombs, in the mode that takes most memory to prepare."""
    path = put(lambda path: Image.new("F", (9400, 9400), 0.5).save(path), tmp_path / "large.tiff")
    program = f"from calibration.sources import open_image; from pathlib import Path; open_image(Path({str(path)!r}))"
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", program])
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    assert usage.ru_maxrss < 2 << 20
