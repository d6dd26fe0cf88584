"""What lies at the output: refused, replaced or left, and never lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from manifests.errors import BadInputError
from manifests.files import file_record
from manifests.io import write_manifest
from manifests.model import CalibrationSettings, ComponentRecord, FileRecord, Manifest, Settings, Source, Validation
from vlmconvert.conversion.publish import Planned, check_output, check_results, publish, replace_folder, staging

PASSES = ["split", "export-openvino{dtype=f16}"]
PLANNED = Planned(
    {"model": PASSES},
    {"model": {}},
    {"openvino": "2026.4.0"},
    {"graph.bin": 3},
    {"config.json": 2, "model.safetensors": 4},
    Settings(options={}, calibration=None),
)


def write_artifact(folder: Path, weights: bytes = b"new", validation: float | None = None) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.bin").write_bytes(weights)
    (folder / "graph.xml").write_bytes(b"<net/>")
    (folder / "config.json").write_bytes(b"{}")
    (folder / "README.md").write_text(f"# Artifact of {weights!r}, {validation}")
    component = ComponentRecord(
        name="model",
        role="",
        format="openvino",
        precision="fp16",
        files=[file_record(folder / name, folder) for name in ("graph.bin", "graph.xml")],
        inputs=[],
        outputs=[],
        state=[],
        logits=None,
        weights={},
        blocks={},
        passes=PASSES,
        fallbacks=[],
    )
    sources = [FileRecord(path=path, size=size, sha256="0" * 64) for path, size in PLANNED.sources.items()]
    measured = Validation(
        metric="kl",
        component="artifact",
        reference=None,
        value=validation or 0,
        threshold=1.0,
        passed=True,
        samples=1,
    )
    manifest = Manifest(
        name="demo",
        family="mllama",
        target="openvino",
        source=Source(model="checkpoint", revision=None, architecture="x", dtype="BF16", files=sources),
        components=[component],
        assets=[file_record(folder / "config.json", folder)],
        calibration=None,
        validation=[] if validation is None else [measured],
        environment=dict(PLANNED.environment),
        settings=PLANNED.settings,
    )
    write_manifest(manifest, folder)
    return manifest


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a checkpoint, and a working directory and a home elsewhere."""
    for name in ("work", "elsewhere", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    checkpoint = tmp_path / "work" / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"\x00\x01\x02\x03")
    return tmp_path / "work"


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder: the bytes of files, where links point to."""

    def content(path: Path) -> bytes | str | None:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def convert(
    output: Path, checkpoint: Path, force: bool = False, weights: bytes = b"new", said: list[str] | None = None
):
    """What a conversion does with its output."""
    check_output(output, checkpoint, PLANNED, force)
    with staging(output) as staged:
        manifest = write_artifact(staged, weights)
        publish(staged, output, checkpoint, manifest, force, [].append if said is None else said.append)


def refuse(output: Path, checkpoint: Path, message: str, force: bool = True):
    """Both before the work and after it the output is refused, and all is as it was."""
    before = snapshot(checkpoint.parents[1])
    with pytest.raises(BadInputError, match=message) as refused:
        check_output(output, checkpoint, PLANNED, force)
    assert re.search("choose another folder|give a folder inside it", str(refused.value))
    assert snapshot(checkpoint.parents[1]) == before
    # As if it had come to be there during the work.
    with pytest.raises(BadInputError, match=message), staging(output) as staged:
        publish(staged, output, checkpoint, write_artifact(staged), force, print)
    assert snapshot(checkpoint.parents[1]) == before


def test_a_new_folder_is_made_with_those_above_it(work):
    output = work / "a" / "b" / "out"
    convert(output, work / "checkpoint")
    assert (output / "graph.bin").read_bytes() == b"new"
    assert output.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(work):
    (work / "out").mkdir()
    convert(work / "out", work / "checkpoint")
    assert (work / "out" / "graph.bin").exists()
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint", "out"]


def test_a_new_folder_inside_the_checkpoints_harms_nothing(work):
    before = snapshot(work / "checkpoint")
    convert(work / "checkpoint" / "out", work / "checkpoint")
    assert before.items() <= snapshot(work / "checkpoint").items()
    refuse(work / "checkpoint" / "out", work / "checkpoint", "lies in the folder of the checkpoint")


def test_another_result_is_replaced_by_force_alone(work):
    output = work / "out"
    write_artifact(output, b"older")
    for name in ("run.json", "bench.json", "report.html"):
        (output / name).write_text("")
    (output / "evaluation" / "images").mkdir(parents=True)
    for name in ("evaluation.json", "predictions.jsonl", "images/12.png"):
        (output / "evaluation" / name).write_text("")
    (output / "evaluation" / "coco").mkdir()
    (output / "evaluation" / "coco" / "evaluation.json").write_text("")
    refuse(output, work / "checkpoint", "holds a different result.*replace it with --force", force=False)
    convert(output, work / "checkpoint", force=True)
    assert sorted(snapshot(output)) == [
        "README.md",
        "config.json",
        "graph.bin",
        "graph.xml",
        "manifest.json",
        "manifest.json.sha256",
    ]
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint", "out"]


def test_the_same_result_stays_and_takes_new_figures_over(work):
    output, said = work / "out", []
    write_artifact(output, validation=0.5)
    (output / "thesis.txt").write_text("mine")
    before = snapshot(output)
    convert(output, work / "checkpoint", said=said)
    assert snapshot(output) == before
    assert said == [f"{output} already holds this result"]
    with staging(output) as staged:
        manifest = write_artifact(staged, validation=0.25)
        after = snapshot(staged)
        publish(staged, output, work / "checkpoint", manifest, False, print)
    assert snapshot(output) == {**after, "thesis.txt": b"mine"}
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize(
    "change",
    [
        {"passes": {"model": PASSES[:1]}},
        {"passes": {"model": PASSES, "other": PASSES}},
        {"environment": {"openvino": "2026.4.1"}},
        {"layers": {"model": {"layers.0.mlp.up_proj.weight": "int8"}}},
        {"sizes": {"graph.bin": 4}},
        {"sizes": {"graph.onnx": 3}},
        {"sources": {"config.json": 3, "model.safetensors": 4}},
        {"sources": {"config.json": 2}},
        {"settings": Settings(options={}, calibration=CalibrationSettings(seed=1))},
    ],
)
def test_what_differs_on_metadata_is_refused_before_the_work(work, change):
    write_artifact(work / "out")
    check_output(work / "out", work / "checkpoint", PLANNED, force=False)
    with pytest.raises(BadInputError, match="holds a different result"):
        check_output(work / "out", work / "checkpoint", Planned(**(vars(PLANNED) | change)), force=False)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_not_replaced(work, force):
    (work / "out").write_text("mine")
    refuse(work / "out", work / "checkpoint", "exists and is a file", force)
    before = snapshot(work)
    with pytest.raises(BadInputError, match="cannot be made, as .*out is a file"):
        check_output(work / "out" / "more" / "out", work / "checkpoint", PLANNED, force)
    assert snapshot(work) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_vlmconvert_did_not_write_is_refused(work, force):
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("mine")
    refuse(work / "out", work / "checkpoint", "exists and vlmconvert did not write it: choose another", force)
    (work / "out" / "manifest.json").write_text('{"manifest_version": 3, "name": "a browser extension"}')
    refuse(work / "out", work / "checkpoint", "holds a manifest.json that this vlmconvert cannot read", force)
    shutil.rmtree(work / "checkpoint")
    write_artifact(work / "checkpoint", b"older")
    os.remove(work / "checkpoint" / "manifest.json")
    refuse(work / "checkpoint", work / "checkpoint", "folder of the checkpoint" if force else "did not write it", force)


@pytest.mark.parametrize(
    "name",
    ["thesis.txt", ".git/HEAD", "evaluation/notes.txt", "more/deep/x.safetensors", "images/1.png", "bench.json/x"],
)
def test_a_foreign_file_is_named(work, name):
    write_artifact(work / "out", b"older")
    foreign = work / "out" / name
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("mine")
    refuse(work / "out", work / "checkpoint", f"also holds {name}, which vlmconvert did not write: move it elsewhere")
    (work / "out" / "another.txt").write_text("mine")
    refuse(work / "out", work / "checkpoint", "also holds .* and 1 more, which vlmconvert did not write")


def test_a_foreign_link_is_named_and_not_followed(work):
    write_artifact(work / "out", b"older")
    (work / "photos").mkdir()
    (work / "photos" / "me.jpg").write_text("mine")
    (work / "out" / "photos").symlink_to(work / "photos")
    refuse(work / "out", work / "checkpoint", "also holds photos, which")


def as_artifact(folder: Path):
    """So that nothing but its place speaks against replacing it."""
    write_artifact(folder, b"older")
    return folder


def test_the_checkpoint_is_never_replaced(work):
    checkpoint = as_artifact(work / "made")
    refuse(checkpoint, checkpoint, "is the folder of the checkpoint, which --force does not replace")
    refuse(work / "made" / ".." / "made", checkpoint, "is the folder of the checkpoint")
    (work / "link").symlink_to(checkpoint)
    refuse(work / "link", checkpoint, "is the folder of the checkpoint")
    refuse(checkpoint, work / "link", "is the folder of the checkpoint")


def test_what_holds_the_checkpoint_is_never_replaced(work):
    refuse(work, work / "checkpoint", "holds the folder of the checkpoint")
    write_artifact(work, b"older")
    refuse(work, work / "checkpoint", "holds the folder of the checkpoint")
    (work.parent / "link").symlink_to(work)
    refuse(work.parent / "link", work / "checkpoint", "holds the folder of the checkpoint")


def test_what_a_checkpoints_links_point_to_is_never_replaced(work):
    """As the hub's cache keeps files; and as a person lends an artifact's files to a checkpoint."""
    write_artifact(work / "out", b"older")
    (work / "checkpoint" / "tokenizer.json").symlink_to("../out/config.json")
    refuse(work / "out", work / "checkpoint", "holds the file to which .*tokenizer.json of the checkpoint is a link")


def test_the_working_directory_and_what_holds_it_are_never_replaced(work, monkeypatch):
    checkpoint = work / "checkpoint"
    (as_artifact(work / "out") / "evaluation").mkdir()
    for place in (work / "out", work / "out" / "evaluation"):
        monkeypatch.chdir(place)
        refuse(work / "out", checkpoint, "working directory.*, which is never replaced")
    refuse(Path(".."), checkpoint, "working directory")
    (work / "empty").mkdir()
    monkeypatch.chdir(work / "empty")
    for force in (False, True):
        refuse(Path(), checkpoint, "is the working directory", force)


def test_home_and_what_holds_it_are_never_replaced(work, monkeypatch):
    write_artifact(work.parent / "home", b"older")
    refuse(work.parent / "home", work / "checkpoint", "is the home directory")
    (as_artifact(work / "users") / "evaluation").mkdir()
    monkeypatch.setenv("HOME", str(work / "users" / "evaluation"))
    refuse(work / "users", work / "checkpoint", "holds the home directory .*evaluation, which is never replaced")


def test_a_mount_point_is_never_replaced(work, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == work / "out")
    (work / "out").mkdir()
    refuse(work / "out", work / "checkpoint", "is a mount point.*give a folder inside it", force=False)
    write_artifact(work / "out", b"older")
    refuse(work / "out", work / "checkpoint", "is a mount point")


def test_a_link_stays_and_what_it_points_to_is_filled(work):
    (work / "disk").mkdir()
    link = work / "out"
    link.symlink_to("disk/out")
    for weights in (b"one", b"two"):
        convert(link, work / "checkpoint", force=True, weights=weights)
        assert os.readlink(link) == "disk/out"
        assert (work / "disk" / "out" / "graph.bin").read_bytes() == weights
    assert [path.name for path in (work / "disk").iterdir()] == ["out"]
    (work / "loop").symlink_to("loop")
    with pytest.raises(BadInputError, match="is a link that cannot be followed"):
        check_output(work / "loop", work / "checkpoint", PLANNED, True)


def test_a_name_that_is_too_long_and_a_folder_that_is_not_writable(work, monkeypatch):
    convert(work / ("x" * 255), work / "checkpoint")
    with pytest.raises(BadInputError, match="cannot be used .File name too long.: choose another"):
        check_output(work / ("x" * 256), work / "checkpoint", PLANNED, False)

    def refused(**options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(BadInputError, match="nothing can be written into .*work .Permission denied.: choose another"):
        check_output(work / "a" / "out", work / "checkpoint", PLANNED, False)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_loses_nothing(work, monkeypatch, fails):
    write_artifact(work / "out", b"older")
    before, calls, rename = snapshot(work), [], Path.rename

    def broken(path, target):
        calls.append(path)
        if len(calls) == fails:
            raise OSError("the disk is on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="on fire"):
        convert(work / "out", work / "checkpoint", force=True)
    assert snapshot(work) == before


def test_nothing_goes_if_not_even_the_old_folder_can_return(work, monkeypatch):
    write_artifact(work / "out", b"older")
    before, calls, rename = snapshot(work / "out"), [], Path.rename

    def broken(path, target):
        calls.append(path)
        if len(calls) > 1:
            raise OSError("the disk is on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    (work / "new").mkdir()
    with pytest.raises(OSError, match="on fire"):
        replace_folder(work / "new", work / "out")
    (kept,) = work.glob(".vlmconvert-*/out")
    assert snapshot(kept) == before


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_run_that_is_killed_while_it_replaces_a_result_loses_neither(work, dies_at):
    """The next run gives the older result its name again if the newer one has not got it yet."""
    write_artifact(work / "out", b"older")
    write_artifact(work / "new", b"newer")
    program = f"""
import os
from pathlib import Path
from vlmconvert.conversion import publish
calls, rename = [], Path.rename
def dying(path, target):
    calls.append(path)
    if len(calls) == {dies_at}:
        os._exit(9)
    return rename(path, target)
Path.rename = dying
publish.remove_tree = lambda folder: os._exit(9)
publish.replace_folder(Path("new"), Path("out"))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=work, check=False).returncode == 9
    with staging(work / "out"):
        assert (work / "out" / "graph.bin").read_bytes() == (b"newer" if dies_at == 3 else b"older")
    assert not list(work.glob(".vlmconvert-*"))


def test_what_killed_runs_have_left_is_removed(work):
    program = """
import os
from pathlib import Path
from vlmconvert.conversion.publish import staging
with staging(Path("out")) as staged:
    (staged / "graph.bin").write_bytes(b"half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=work, check=False).returncode == 9
    assert len(list(work.glob(".vlmconvert-*/graph.bin"))) == 1
    with staging(work / "out"):
        assert not list(work.glob(".vlmconvert-*/graph.bin"))


def test_work_that_fails_leaves_what_was_there_and_no_folders(work):
    before = snapshot(work)
    with pytest.raises(FileNotFoundError), staging(work / "a" / "b" / "out") as staged:
        (staged / "graph.bin").write_bytes((staged / "block.bin").read_bytes())
    assert snapshot(work) == before


def test_a_file_that_comes_into_an_empty_output_in_the_last_moment_stays(work, monkeypatch):
    (work / "out").mkdir()
    rmdir = Path.rmdir

    def late(path):
        if path == work / "out":
            (path / "thesis.txt").write_text("mine")
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", late)
    with pytest.raises(OSError, match="not empty"):
        convert(work / "out", work / "checkpoint")
    assert snapshot(work / "out") == {"thesis.txt": b"mine"}


def evaluate(results: Path, content: str):
    """What an evaluation does with its folder."""
    check_results(results)
    with staging(results) as staged:
        (staged / "images").mkdir()
        for name in ("evaluation.json", "predictions.jsonl", "images/0.png"):
            (staged / name).write_text(content)
        replace_folder(staged, results)


def test_results_are_replaced_by_results(work):
    (work / "link").symlink_to("results")
    for results in (work / "results", work / "new" / "results", work / "link"):
        for content in ("first", "second"):
            evaluate(results, content)
            assert set(snapshot(results).values()) == {content.encode(), None}
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint", "link", "new", "results"]


@pytest.mark.parametrize("name", ["thesis.txt", "coco/evaluation.json", "images/me.png", "manifest.json"])
def test_a_folder_of_results_with_anything_else_is_refused(work, name):
    evaluate(work / "results", "first")
    (work / "results" / name).parent.mkdir(exist_ok=True)
    (work / "results" / name).write_text("mine")
    before = snapshot(work)
    with pytest.raises(BadInputError, match=f"results also holds {name}, which vlmconvert did not write: move it"):
        check_results(work / "results")
    assert snapshot(work) == before


def test_results_do_not_replace_what_is_needed(work, monkeypatch):
    evaluate(work / "results", "first")
    monkeypatch.chdir(work / "results")
    with pytest.raises(BadInputError, match="is the working directory"):
        check_results(Path())
    with pytest.raises(BadInputError, match="exists and is a file"):
        check_results(work / "results" / "evaluation.json")
    with pytest.raises(BadInputError, match="checkpoint also holds config.json and 1 more"):
        check_results(work / "checkpoint")
