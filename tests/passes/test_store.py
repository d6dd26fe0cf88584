from pathlib import Path

import pytest

from passes.store import Store, digest


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
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_digest_depends_on_values_not_on_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("a", "bc") != digest("ab", "c")
