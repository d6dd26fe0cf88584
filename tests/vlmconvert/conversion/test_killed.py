"""Runs that are killed go on to the same bytes; `python -m tests.kill_anywhere` tries many more moments."""

import signal

import pytest

from tests.kill_anywhere import Case


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("target", "kills"),
    [
        ("openvino", [(signal.SIGTERM, 0.5), (signal.SIGKILL, 0.7)]),
        ("ascend", [(signal.SIGINT, 0.7)]),
    ],
)
def test_a_killed_run_leaves_nothing_and_goes_on(target, kills, tmp_path):
    case = Case(target, tmp_path, patience=60)  # other tests may keep the cores busy
    case.prepare()
    for number, share in kills:
        case.kill(number, share * case.seconds)
