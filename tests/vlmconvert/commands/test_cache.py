import os

import pytest

from passes.store import Store
from tests.conftest import vlmconvert


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    for number, key in enumerate(("ab", "cd")):
        entry = store.get_or_make(key * 32, lambda folder: (folder / "x").write_bytes(bytes(2000)), f"entry {key}")
        os.utime(entry, (1000 + number, 1000 + number))
    return store


def test_it_lists_and_prunes(store):
    listed = vlmconvert("cache", "list", "--store", store.root)
    assert listed.exit_code == 0, listed.output
    for text in ("entry ab", "entry cd", "cdcdcdcdcdcd", "2 kB", "1970-01-01", "2 entries, 4 kB"):
        assert text in listed.output
    assert vlmconvert("cache", "size", "--store", store.root).output == "4000\n"
    pruned = vlmconvert("cache", "prune", "--limit", "3kB", "--store", store.root)
    assert "removed 1 entry, 2 kB" in pruned.output
    assert [entry.what for entry in store.entries()] == ["entry cd"]
    assert vlmconvert("cache", "prune", "--limit", "0", "--store", store.root).exit_code == 0
    assert vlmconvert("cache", "size", "--store", store.root).output == "0\n"


def test_a_store_that_does_not_exist_is_empty(tmp_path):
    assert "0 entries" in vlmconvert("cache", "list", "--store", tmp_path / "none").output
    assert vlmconvert("cache", "size", "--store", tmp_path / "none").output == "0\n"
    assert not (tmp_path / "none").exists()


def test_bad_input_is_refused(store, tmp_path, monkeypatch):
    result = vlmconvert("cache", "prune", "--limit", "much", "--store", store.root)
    assert (result.exit_code, len(store.entries())) == (2, 2)
    assert "--limit much is not a size" in result.output
    (tmp_path / "file").write_text("")
    assert vlmconvert("cache", "size", "--store", tmp_path / "file").exit_code == 2
    monkeypatch.setenv("VLMCONVERT_STORE_LIMIT", "much")
    result = vlmconvert("llava", "-o", tmp_path / "out", "--store", tmp_path / "other")
    assert result.exit_code == 2
    assert "VLMCONVERT_STORE_LIMIT is much, which is not a size" in result.output
    assert not (tmp_path / "other").exists()


def test_a_conversion_keeps_the_store_below_its_limit(store, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMCONVERT_STORE_LIMIT", "1kB")
    options = ("--llm", "fp16", "--vision", "fp16", "--no-validate", "--store", store.root)
    result = vlmconvert("llava", *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "store: removed the oldest 2 entries" in result.output
    kept = [entry.what for entry in store.entries()]
    assert "llava: traces" in kept
    assert "llava: language model, fp16 for openvino" in kept
    assert not {"entry ab", "entry cd"} & set(kept)
