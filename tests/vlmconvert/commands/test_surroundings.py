"""What is around a command: its streams, the store, the output and other files that it writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import vlmconvert

PLAN = ("mllama", "--llm", "fp16", "--vision", "fp16", "--no-validate", "--dry-run")
SHELL = "{python} -m vlmconvert cache size --store {store} {more}"


@pytest.mark.parametrize(
    ("option", "place", "message"),
    [
        ("--store", "file", "the store file cannot be used (File exists): choose another folder with --store"),
        ("--store", "file/in", "the store file/in cannot be used (Not a directory)"),
        ("--store", "/proc/none", "the store /proc/none cannot be used"),
        ("--save-recipe", "/proc/none.toml", "--save-recipe /proc/none.toml cannot be written"),
        ("-o", "/proc/none", "/proc/none cannot be made, as nothing can be written into /proc"),
        ("-o", ".", ". exists and vlmconvert did not write it"),
        ("-o", "a" * 300, "cannot be used (File name too long)"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(option, place, message, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    places = {"--store": store, "-o": tmp_path / "out"} | {option: place}
    result = vlmconvert(*PLAN, *(part for pair in places.items() for part in pair))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_home_that_is_not_writable_is_no_place_for_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/1")
    result = vlmconvert(*PLAN, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "choose another folder with --store" in result.output


def test_a_link_to_nothing_is_filled(store, tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    result = vlmconvert(*PLAN, "-o", tmp_path / "link", "--store", store)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("more", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "| true"])
def test_closed_streams_do_not_matter(more, tmp_path):
    command = SHELL.format(python=sys.executable, store=tmp_path, more=more)
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"What \xff?", "standard input is no text in UTF-8 (byte 5): save it as UTF-8"),
        (b"\xff\xfeW\0h\0", "standard input is no text in UTF-8 (byte 0)"),
        (b"What\0?", "standard input holds zero bytes"),
        (b"", "there is no question"),
    ],
)
def test_a_question_that_is_no_text_is_refused(given, message, tmp_path):
    from click.testing import CliRunner

    from vlmconvert.commands.cli import main

    result = CliRunner().invoke(main, ["run", str(tmp_path), "--prompt", "-"], input=given)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_question_in_other_bytes_on_the_command_line_is_refused(tmp_path):
    result = vlmconvert("run", tmp_path, "--prompt", os.fsdecode(b"What \xff?"))
    assert result.exit_code == 2
    assert "--prompt is no text in UTF-8" in result.output
