import io
import threading

import pytest
from rich.console import Console

from vlmconvert import console
from vlmconvert.console import Reporter, format_time


@pytest.fixture
def reporter():
    made = Reporter()
    made.err = Console(file=io.StringIO(), width=120)
    return made


def test_two_stages_at_a_time_share_a_terminal(reporter):
    reporter.err = Console(file=io.StringIO(), width=120, force_terminal=True)
    with reporter.stage("outer", 2) as outer:
        with reporter.stage("inner", 1) as inner:
            inner("a block")
            reporter._bars.refresh()
        outer("another")
        assert [task.description for task in reporter._bars.tasks] == ["outer"]
    shown = reporter.err.file.getvalue()
    assert "a block" in shown
    assert shown.index("inner: 0.") < shown.index("outer: 0.")
    assert reporter._bars is None


def test_a_stage_may_end_in_another_thread_than_it_began(reporter):
    reporter.err = Console(file=io.StringIO(), width=120, force_terminal=True)
    stage = reporter.stage("inner", 1)
    with reporter.stage("outer", 1):
        begun = threading.Thread(target=stage.__enter__)
        begun.start()
        begun.join()
        stage.__exit__(None, None, None)
    assert reporter._bars is None


def test_a_failed_stage_leaves_no_display(reporter):
    reporter.err = Console(file=io.StringIO(), width=120, force_terminal=True)
    with pytest.raises(ValueError, match="no"), reporter.stage("work", 3):
        raise ValueError("no")
    assert reporter._bars is None


def test_lines_say_how_far_a_stage_is(reporter, monkeypatch):
    monkeypatch.setattr(console, "_LOG_INTERVAL", 0)
    with reporter.stage("work", 4) as step:
        step("one")
        step("two")
    with reporter.stage("more") as step:
        step("three")
    lines = reporter.err.file.getvalue().splitlines()
    assert lines[0] == "work: 4 steps ..."
    assert lines[1].startswith("work: 1/4 one, about ")
    assert lines[2].startswith("work: 2/4 two, about ")
    assert lines[4:6] == ["more ...", "more: three"]


def test_times_are_said_in_fitting_units():
    assert [format_time(seconds) for seconds in (0.4, 12, 150, 9000)] == [
        "0 seconds",
        "12 seconds",
        "2 minutes",
        "2.5 hours",
    ]
