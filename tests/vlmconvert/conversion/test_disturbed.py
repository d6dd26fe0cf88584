"""Runs whose disk is full, or whose files vanish, go on to the same bytes; `python -m tests.disturb_anywhere` tries more moments."""

import shutil
import subprocess

import pytest

from tests.disturb_anywhere import main_in_namespace
from tests.kill_anywhere import OPTIONS


def may_mount() -> bool:
    """Whether a user may mount a disk in memory in a namespace of their own."""
    if shutil.which("unshare") is None:
        return False
    attempt = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", OPTIONS)
@pytest.mark.skipif(not may_mount(), reason="a user may not mount a disk in memory here")
def test_a_disturbed_run_is_one_sentence_and_goes_on(target):
    assert main_in_namespace(["--target", target, "--moments", "8"]) == 0
