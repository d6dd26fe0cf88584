"""Shared fixtures: the demo checkpoint, and artifacts that several tests look at."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

# Before anything imports torch: the tests' own processes share the cores already. Each keeps to one core with all that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity"):
        _cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {_cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(_cores)]})

import pytest
from click.testing import CliRunner, Result

from passes.ascend.msmodelslim import calibrate
from passes.onnx.trace import trace_kinds
from passes.store import _intact
from tests.traces import keep_traces
from vlmconvert.commands.cli import main
from vlmconvert.conversion import convert as conversion
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.machine import cores, free_memory, measure_machine
from vlmconvert.families import FAMILIES, demo_checkpoint

_run = Helper.run
# The demos know scenes alone, and long texts take longer.
COMMANDS, CALIBRATION = ("convert", *FAMILIES.names), {"calibration": "scenes"}


def pytest_configure(config: pytest.Config) -> None:
    """The filter is set here, since pytest imports torch for it, which reads the number of threads at that moment."""
    config.addinivalue_line("filterwarnings", "ignore::torch.jit.TracerWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: else the last of them runs while all other processes have nothing left to do.

    Of the slow ones, those that look at the same traces for ONNX as test_transfer.py come last: it has made them by then.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.name in {"test_trace.py", "test_file.py"}))


def vlmconvert(*arguments: str | Path, input: str | None = None) -> Result:
    """Run the command line in this process, which trusts the store no more than a new process would."""
    _intact.clear()
    typed = [str(argument) for argument in arguments]
    # A recipe has a calibration of its own.
    defaults = {} if "--recipe" in typed else dict.fromkeys(COMMANDS, CALIBRATION)
    return CliRunner().invoke(main, typed, input=input, default_map=defaults)


def exhaustive_but(kept: Iterable[object], values: Iterable[object]) -> list[object]:
    """Parameters, of which all but the kept ones are cases that only `make test-all` runs."""
    kept = list(kept)
    assert all(value in values for value in kept)
    return [value if value in kept else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


@pytest.fixture(scope="session", autouse=True)
def measured_once():
    """The speed of the machine, which takes each conversion a third of a second."""
    once = cache(measure_machine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "measure_machine", lambda: replace(once(), cores=cores(), memory=free_memory()))
        yield


@pytest.fixture(scope="session")
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ONNX traces that all test processes share."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "onnx-traces"


@pytest.fixture(scope="session", autouse=True)
def shared_helper(shared_traces: Path):
    """One helper process for the conversions of a test process: importing transformers takes longer than most of them."""
    shared = Helper()

    def run(helper: Helper, function, *arguments, **options):
        if function is trace_kinds:
            return keep_traces(shared_traces, partial(_run, shared, trace_kinds, **options), *arguments)
        return _run(helper if function is calibrate else shared, function, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Helper, "run", run)
        yield
    shared.close()


@pytest.fixture
def own_helpers(monkeypatch: pytest.MonkeyPatch):
    """A helper process for each conversion, as it is outside of tests: nothing of one run can be seen by another."""
    monkeypatch.setattr(Helper, "run", _run)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working directory: in the checkout's, `make demo` may have left the artifact that a test plans anew."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The embedded demo checkpoint."""
    return demo_checkpoint("mllama")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests of a process; a run removes the activations that another one may still need."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory, store: Path):
    """Convert the demo with given options, once for each set of options."""
    built: dict[tuple[str, ...], Path] = {}

    def convert(*options: str) -> Path:
        if options not in built:
            output = tmp_path_factory.mktemp("artifact") / "out"
            result = vlmconvert("mllama", *options, "-o", output, "--store", store, "--no-validate")
            assert result.exit_code == 0, result.output
            built[options] = output
        return built[options]

    return convert
