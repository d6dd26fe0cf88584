import os
import subprocess
import sys
from pathlib import Path

import pytest

from passes.store import Store, _intact, digest


def test_an_entry_is_made_once(tmp_path):
    store, calls = Store(tmp_path), []

    def make(folder: Path) -> None:
        calls.append(1)
        (folder / "x").write_text("result")

    for _ in range(2):
        assert (store.get_or_make("ab" * 32, make) / "x").read_text() == "result"
    assert calls == [1]
    store.remove("ab" * 32)
    assert "ab" * 32 not in store


def test_failures_are_never_stored_and_leave_nothing(tmp_path):
    store = Store(tmp_path)

    def make(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        store.get_or_make("cd" * 32, make)
    assert "cd" * 32 not in store
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_makers_of_one_entry_agree(tmp_path):
    store = Store(tmp_path)

    def make(folder: Path) -> None:
        (folder / "x").write_text("first")
        if not nested:
            nested.append(1)
            store.get_or_make("ef" * 32, make)

    nested: list[int] = []
    assert (store.get_or_make("ef" * 32, make) / "x").read_text() == "first"
    assert len([path for path in tmp_path.glob("*/*") if path.is_dir()]) == 1


def test_digest_depends_on_values_not_on_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("a", "bc") != digest("ab", "c")


def filled(store, *keys):
    """Entries of 100 bytes, each last used a second after the one before."""
    for number, key in enumerate(keys):
        entry = store.get_or_make(key * 32, lambda folder: (folder / "x").write_bytes(bytes(100)), f"entry {key}")
        os.utime(entry, (1000 + number, 1000 + number))


def test_entries_say_what_they_are(tmp_path):
    store = Store(tmp_path)
    filled(store, "cd", "ab")
    assert [(entry.key[:2], entry.what, entry.size, entry.used) for entry in store.entries()] == [
        ("cd", "entry cd", 100, 1000),
        ("ab", "entry ab", 100, 1001),
    ]
    store.remove("ab" * 32)
    assert [entry.key[:2] for entry in store.entries()] == ["cd"]
    assert not list((tmp_path / "ab").iterdir())


def test_what_was_not_used_for_longest_is_removed_first(tmp_path):
    store = Store(tmp_path)
    filled(store, "aa", "bb", "cc", "dd")
    store.get_or_make("aa" * 32, lambda folder: None)
    assert [entry.key[:2] for entry in store.prune(250)] == ["bb", "cc"]
    assert store.prune(250) == []
    assert [entry.key[:2] for entry in store.entries()] == ["dd", "aa"]
    assert [entry.key[:2] for entry in store.prune(0, unused=3600)] == ["dd"]
    assert [entry.key[:2] for entry in store.prune(0)] == ["aa"]
    assert store.entries() == []


def test_entries_that_were_never_finished_are_removed(tmp_path):
    program = f"""
import os
import os
import subprocess
import sys
from pathlib import Path
from passes.store import Store
Store(Path({str(tmp_path)!r})).get_or_make("ab" * 32, lambda folder: os._exit(0))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert [path.name[:8] for path in (tmp_path / "ab").iterdir()] == [".making-"]
    assert Store(tmp_path).entries() == []
    assert Store(tmp_path).remove_leftovers() == 1
    assert not list((tmp_path / "ab").iterdir())
    assert Store(tmp_path / "none").remove_leftovers() == 0


def test_an_owner_knows_the_size_of_its_own_entries(tmp_path):
    own, other = Store(tmp_path, "mine"), Store(tmp_path, "yours")
    own.get_or_make("a" * 64, lambda folder: (folder / "x").write_bytes(bytes(3)), "a result")
    other.get_or_make("b" * 64, lambda folder: (folder / "x").write_bytes(bytes(50)), "a result")
    assert [store.size() for store in (own, other, Store(tmp_path, "nobody"))] == [3, 50, 0]
    assert Store(tmp_path).size() == 53
    assert [entry.what for entry in own.entries()] == ["mine: a result", "yours: a result"]


@pytest.mark.parametrize("damage", ["flipped", "shorter", "missing", "added", "unsummed"])
def test_a_damaged_entry_is_noticed_by_the_next_process_and_made_again(tmp_path, damage):
    store, key = Store(tmp_path), "ab" * 32

    def make(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_bytes(bytes(range(200)))

    file = store.get_or_make(key, make) / "inner" / "x"
    if damage == "flipped":
        file.write_bytes(bytes([1, *range(1, 200)]))
    elif damage == "shorter":
        file.write_bytes(bytes(range(199)))
    elif damage == "missing":
        file.unlink()
    elif damage == "added":
        (file.parent / "y").touch()
    else:
        next(tmp_path.glob("*/*.json")).unlink()
    assert key in store  # this process has made it
    _intact.clear()
    assert key not in store
    assert not file.exists()
    assert (store.get_or_make(key, make) / "inner" / "x").read_bytes() == bytes(range(200))
