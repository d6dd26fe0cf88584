"""The command line and what its `--output` could destroy."""

import shutil

from tests.conftest import vlmconvert
from vlmconvert.families import demo_checkpoint


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_users_checkpoint_and_what_lies_beside_it_stay(tmp_path, store, monkeypatch):
    checkpoint = shutil.copytree(demo_checkpoint("llava"), tmp_path / "models" / "llava")
    (tmp_path / "models" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(checkpoint)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "models")
    for output, message in (
        (checkpoint, "is the folder of the checkpoint, which --force does not replace"),
        (tmp_path / "link", "is the folder of the checkpoint, which --force does not replace"),
        ("..", "holds the working directory"),
        (".", "is the working directory"),
    ):
        for options, expected in (("--force",), message), ((), "exists and vlmconvert did not write it"):
            result = vlmconvert("llava", checkpoint, "-o", output, "--store", store, *options)
            assert result.exit_code == 2, result.output
            assert expected in " ".join(result.output.split())
            assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
