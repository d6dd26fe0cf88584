"""Artifacts that a stranger has changed: `verify` says so, and no command runs, opens or shows what it should not."""

from __future__ import annotations

import shutil

import pytest

from tests.checkpoints import write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.hostile.artifacts import CHANGED

pytestmark = pytest.mark.slow
BY_NAME = {changed.name: changed for changed in CHANGED}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, store):
    """A small artifact for each target that is changed."""
    folder = tmp_path_factory.mktemp("artifacts")
    checkpoint = write_checkpoint(folder / "checkpoint")
    for target in sorted({changed.target for changed in CHANGED}):
        options = ("--target", target, "--llm", "int8", "--vision", "int8", "--no-validate", "--store", store)
        result = vlmconvert("llava", checkpoint, *options, "-o", folder / target)
        assert result.exit_code == 0, result.output
    return folder


def said(result) -> str:
    """The output, in which nothing is a failure of vlmconvert itself."""
    output = " ".join(result.output.split())
    assert "Traceback" not in result.output, result.output
    assert result.exit_code in (0, 1, 2), result.output
    assert all(character.isprintable() or character in "\n\t\r" for character in result.output)
    return output


@pytest.mark.parametrize("name", exhaustive_but([name for name in BY_NAME if BY_NAME[name].finding], BY_NAME))
def test_it_misleads_nobody(name, artifacts, tmp_path):
    changed = BY_NAME[name]
    folder = tmp_path / "artifact"
    shutil.copytree(artifacts / changed.target, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    changed.apply(folder)
    before = sorted(tmp_path.rglob("*"))
    verified = vlmconvert("verify", folder, "--no-run")
    assert changed.finding in said(verified)
    assert verified.exit_code != 0 or not changed.finding
    ran = vlmconvert("run", folder, "--prompt", "What is this?", "--max-new-tokens", 2)
    said(ran)
    assert ran.exit_code == 0 or not changed.runs
    for command in (
        ("recipe", folder),
        ("bom", folder, "-o", tmp_path / "bom.json"),
        ("report", folder, "-o", tmp_path / "r.html"),
    ):
        said(vlmconvert(*command))
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix not in (".html", ".json")] == [
        path for path in before if path.suffix not in (".html", ".json")
    ]
