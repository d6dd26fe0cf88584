import hashlib
import io
import os

import pytest

from manifests.errors import BadInputError
from manifests.files import read_json, read_record, write_atomically, write_hashed, write_json
from manifests.model import FileRecord


@pytest.mark.parametrize("reserves", [True, False])
def test_hashed_while_written(tmp_path, monkeypatch, reserves):
    """Also where the system cannot reserve a file's space, as on macOS and Windows."""
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")
    chunks = [bytes([number]) * 1000 for number in range(10)]
    record = write_hashed(tmp_path / "weights.bin", chunks, 10_000)
    content = (tmp_path / "weights.bin").read_bytes()
    assert content == b"".join(chunks)
    assert (record.path, record.size, record.sha256) == ("weights.bin", 10_000, hashlib.sha256(content).hexdigest())


def test_nothing_to_write(tmp_path):
    record = write_hashed(tmp_path / "empty", [], 0)
    assert (tmp_path / "empty").read_bytes() == b""
    assert record.sha256 == hashlib.sha256().hexdigest()


def test_lines_end_alike_on_every_system(tmp_path, monkeypatch):
    opened = io.open

    def windows(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        stream = opened(path, mode, buffering, encoding, errors, newline)
        if newline is None and "b" not in mode:
            stream.reconfigure(newline="\r\n")
        return stream

    monkeypatch.setattr(io, "open", windows)
    write_atomically(tmp_path / "a.json", "{}\n")
    assert (tmp_path / "a.json").read_bytes() == b"{}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_nothing_beside_the_file_is_touched(tmp_path):
    (tmp_path / "answers.json.tmp").write_text("mine")
    write_atomically(tmp_path / "answers.json", "{}\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "answers.json": "{}\n",
        "answers.json.tmp": "mine",
    }


def test_a_failed_write_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert [item.name for item in tmp_path.iterdir()] == ["answers.json"]
    assert path.read_text() == "before"


def test_a_link_keeps_pointing_to_its_file(tmp_path):
    (tmp_path / "shared").mkdir()
    link = tmp_path / "report.html"
    link.symlink_to("shared/report.html")
    for text in ("first", "second"):
        write_atomically(link, text)
        assert link.is_symlink()
        assert (tmp_path / "shared" / "report.html").read_text() == text


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_permissions_are_those_of_a_new_file(tmp_path):
    write_atomically(tmp_path / "written", "")
    (tmp_path / "touched").touch()
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "touched").stat().st_mode


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"name": "größe", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_one_sentence(tmp_path, data):
    path = tmp_path / "a.json"
    with pytest.raises(BadInputError, match=r"a\.json is missing: make it again$"):
        read_json(path, "make it again")
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=r"a\.json cannot be read as JSON \(.*\): fetch the file again$"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"size": 1, "sha256": "0" * 64}, "path is missing"),
        ({"path": "a", "size": 1, "sha256": "0" * 64, "more": 1}, "more is unknown"),
        ({"path": "a", "size": -1, "sha256": "0" * 64}, "size: Input should be greater than or equal to 0"),
        ([], "a record (Input should be"),
    ],
)
def test_what_does_not_fit_a_model_is_one_sentence(tmp_path, content, fault):
    write_json(tmp_path / "a.json", content)
    with pytest.raises(BadInputError) as caught:
        read_record(tmp_path / "a.json", FileRecord, "a record", "make it again")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.json'} is not a record (")
    assert fault in text
    assert text.endswith(": make it again")
