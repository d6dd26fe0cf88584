import pytest

from manifests.errors import BadInputError
from tests.conftest import vlmconvert
from vlmconvert.conversion import machine
from vlmconvert.conversion.machine import free_memory, max_memory, measure_machine

GIB = 1 << 30


def limited(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    """Its own files in the cache can be dropped, those that are in use cannot."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    without = free_memory()
    limited(tmp_path, memory_max=3 * GIB, memory_current=2 * GIB, memory_stat=f"anon {GIB}\ninactive_file {GIB // 2}")
    assert free_memory() == 1.5 * GIB < without
    limited(tmp_path, memory_max="max")
    assert free_memory() == pytest.approx(without, rel=0.2)


def test_a_container_of_version_1_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(GIB))
    (folder / "memory.usage_in_bytes").write_text(str(GIB // 4))
    (folder / "memory.stat").write_text("cache 0\n")
    assert free_memory() == 0.75 * GIB


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 * GIB), ("500MB", 500_000_000), ("1.5 gib", 1.5 * GIB)])
def test_a_limit_comes_from_the_option_or_from_the_environment(text, size, monkeypatch):
    assert max_memory(None) is None
    assert max_memory(text) == size
    monkeypatch.setenv("VLMCONVERT_MAX_MEMORY", text)
    assert max_memory(None) == size
    assert max_memory("1GB") == 1_000_000_000
    monkeypatch.setenv("VLMCONVERT_MAX_MEMORY", "")
    assert max_memory(None) is None


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "0.5", "1e9", "nan"])
def test_what_is_no_limit_is_refused_before_the_checkpoint_is_looked_at(text, tmp_path, monkeypatch):
    store = tmp_path / "store"
    given = vlmconvert("llava", tmp_path / "missing", "--max-memory", text, "--store", store)
    assert given.exit_code == 2
    assert "--max-memory" in given.output
    if text:
        monkeypatch.setenv("VLMCONVERT_MAX_MEMORY", text)
        set_ = vlmconvert("llava", tmp_path / "missing", "--store", store)
        assert set_.exit_code == 2
        assert "VLMCONVERT_MAX_MEMORY" in set_.output
    assert not store.exists()


def test_speeds_are_plausible():
    found = measure_machine()
    assert 1 <= found.cores <= 4096
    assert 1e8 < found.multiply < 1e15
    assert 1e6 < found.round < 1e11
    assert 1e7 < found.hash < 1e11


def test_an_error_says_which_option_is_meant():
    with pytest.raises(BadInputError, match="--max-memory much is not a size: write it as 8GiB or 500MB"):
        max_memory("much")
