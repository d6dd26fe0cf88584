"""Two conversions at the same time; the other one is a process that holds its lock."""

import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from manifests.errors import BadInputError
from passes.store import Store
from tests.conftest import vlmconvert
from vlmconvert.conversion.lock import alone_in_store, one_conversion, one_writer

HOLD = """
import sys
from pathlib import Path
from passes.store import Store
from vlmconvert.console import Reporter
from vlmconvert.conversion.lock import one_conversion, one_writer
store = Store(Path(sys.argv[1]))
with one_conversion(store, "checkpoint", Reporter()) if sys.argv[2] == "conversion" else one_writer(store, Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(store, what):
    """Another process that holds a lock until it is told to end."""
    command = [sys.executable, "-c", HOLD, str(store.root), str(what)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_the_second_writer_of_an_output_is_refused(tmp_path):
    store = Store(tmp_path / "store")
    with other_process(store, tmp_path / "out"):
        with pytest.raises(BadInputError, match="another vlmconvert is writing"), one_writer(store, tmp_path / "out"):
            pass
        with one_writer(store, tmp_path / "elsewhere"):
            pass
    with one_writer(store, tmp_path / "out"):
        pass


def test_the_second_conversion_of_a_checkpoint_waits(tmp_path):
    store, said = Store(tmp_path), threading.Event()

    class Says:
        def say(self, text):
            assert text.startswith("waiting for another vlmconvert")
            said.set()

    with other_process(store, "conversion") as process:
        threading.Thread(target=lambda: (said.wait(60), process.stdin.close())).start()
        with one_conversion(store, "checkpoint", Says()):
            assert process.wait(60) == 0
    assert said.is_set()


def test_nothing_is_pruned_while_another_process_converts(tmp_path):
    store = Store(tmp_path)
    store.get_or_make("ab" * 32, lambda folder: (folder / "x").write_bytes(bytes(9)))
    with other_process(store, "conversion"):
        with alone_in_store(store) as alone:
            assert not alone
        result = vlmconvert("cache", "prune", "--limit", "0", "--store", tmp_path)
        assert (result.exit_code, "another vlmconvert is using" in result.output) == (2, True)
    assert vlmconvert("cache", "prune", "--limit", "0", "--store", tmp_path).exit_code == 0
    assert "ab" * 32 not in store
