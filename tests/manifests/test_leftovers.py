import os
import subprocess
import sys
import time

import pytest

from manifests.leftovers import remove_leftovers, temporary_prefix

PREFIX = ".making-"


@pytest.fixture
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(folder, pid, place=None):
    """A folder that a process has left."""
    number, own, rest = temporary_prefix(PREFIX).removeprefix(PREFIX).split(".")
    assert (number, rest) == (str(os.getpid()), "")
    path = folder / f"{PREFIX}{pid}.{place or own}.abc"
    path.mkdir()
    (path / "half").write_text("written")
    return path


def test_what_ended_processes_have_left_is_removed(tmp_path, dead):
    left = left_by(tmp_path, dead)
    (tmp_path / f"{left.name}.file").write_text("")
    assert remove_leftovers(tmp_path, PREFIX) == 2
    assert not list(tmp_path.iterdir())


def test_what_running_processes_write_stays(tmp_path):
    left_by(tmp_path, os.getpid())
    left_by(tmp_path, os.getppid())
    assert remove_leftovers(tmp_path, PREFIX) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_process_with_the_same_number_that_began_later_keeps_nothing(tmp_path):
    left = left_by(tmp_path, os.getpid())
    os.utime(left, (0, 0))
    assert remove_leftovers(tmp_path, PREFIX) == 1


def test_another_machine_has_a_week(tmp_path):
    left = left_by(tmp_path, 1, "elsewhere_1")
    assert remove_leftovers(tmp_path, PREFIX) == 0
    old = time.time() - 8 * 24 * 3600
    os.utime(left, (old, old))
    assert remove_leftovers(tmp_path, PREFIX) == 1


def test_other_names_and_folders_that_do_not_exist_are_left_alone(tmp_path):
    for name in (".making-x", "making-1.a.b", ".making-x.y.z", ".other-1.a.b"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    assert remove_leftovers(tmp_path, PREFIX) == 0
    assert remove_leftovers(tmp_path / "none", PREFIX) == 0
    assert len(list(tmp_path.iterdir())) == 4
