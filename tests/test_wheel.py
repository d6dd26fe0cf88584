"""The wheel: everything that the packages need is inside, and it runs where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("vlmconvert", "passes", "calibration", "manifests")


def run(*command, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools leaves its work beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", output, source, cwd=output)
    [file] = output.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel, and with the libraries of this one but not its vlmconvert.

    A .pth file adds a folder without reading the .pth files there, one of which leads to the checkout.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--no-compile", "--force-reinstall", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    return folder / "bin"


def test_every_file_of_the_packages_is_inside(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.partition("/")[0] in PACKAGES}
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == expected
    assert {f"{name}/py.typed" for name in PACKAGES} <= inside
    assert {"manifests/manifest-v1.schema.json", "vlmconvert/report/page.html.j2"} <= inside
    assert {f"vlmconvert/demo/{name}/model.safetensors" for name in ("mllama", "llava")} <= inside


def test_it_runs_outside_the_checkout(installed, tmp_path):
    where = "import vlmconvert, passes, calibration, manifests; print(*vlmconvert.__path__, *manifests.__path__)"
    for folder in run(installed / "python", "-c", where, cwd=tmp_path).split():
        assert Path(folder).is_relative_to(installed.parent)
    assert "mllama" in run(installed / "vlmconvert", "--help", cwd=tmp_path)
    plan = run(installed / "vlmconvert", "mllama", "--dry-run", "--store", "store", cwd=tmp_path, HOME=str(tmp_path))
    assert "compress-int4-gptq" in plan
    assert "quantize-int8-ptq" in plan
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}
