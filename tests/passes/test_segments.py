"""Files that are written again after an interruption are made of what had been finished, and have the same bytes."""

from __future__ import annotations

import pytest

import passes.export.segments
from passes.export.safetensors import Entry
from passes.export.segments import Segments
from passes.export.shards import Shards
from passes.store import Store
from passes.tensor_pass import MadeTensor

SIZES = (60, 48, 120, 32, 32)
LIMIT = 100  # bytes of a segment: one tensor, one, one that is larger, two


def tensors(made, stop_at=None):
    """Groups of one tensor each; `made` gets the names of those whose bytes are asked for."""

    def group(number, size):
        def chunks():
            if number == stop_at:
                raise KeyboardInterrupt
            made.append(number)
            yield bytes([number]) * size

        return [MadeTensor(Entry(f"tensor {number}", "U8", (size,), size), chunks)]

    return [group(number, size) for number, size in enumerate(SIZES)]


def write(folder, groups, segments=None, shard_size=10**6):
    folder.mkdir()
    return Shards.packed("model", groups, shard_size).write(folder, segments=segments)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(passes.export.segments, "SEGMENT", LIMIT)


@pytest.mark.parametrize("shard_size", [10**6, 120])
def test_segments_change_no_byte(tmp_path, shard_size):
    expected = write(tmp_path / "direct", tensors([]), shard_size=shard_size)
    segments = Segments(Store(tmp_path / "store"), "key")
    assert write(tmp_path / "kept", tensors([]), segments, shard_size) == expected


def test_only_what_was_not_finished_is_made_again(tmp_path):
    store = Store(tmp_path / "store")
    first, again = [], []
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "first", tensors(first, stop_at=4), Segments(store, "key"))
    assert first == [0, 1, 2, 3]
    records = write(tmp_path / "again", tensors(again), Segments(store, "key"))
    assert again == [3, 4]  # they share a segment
    assert records == write(tmp_path / "direct", tensors([]))


def test_segments_of_other_content_are_not_taken(tmp_path):
    store = Store(tmp_path / "store")
    write(tmp_path / "one", tensors([]), Segments(store, "one"))
    made = []
    write(tmp_path / "other", tensors(made), Segments(store, "other"))
    assert made == list(range(len(SIZES)))


def test_discarded_segments_are_gone(tmp_path):
    store = Store(tmp_path / "store")
    segments = Segments(store, "key")
    write(tmp_path / "out", tensors([]), segments)
    assert len(store.entries()) == 4
    segments.discard()
    assert not store.entries()
