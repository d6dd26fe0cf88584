"""Shared fixtures: the demo checkpoint, and artifacts that several tests look at."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch: the tests' own processes share the cores already.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from click.testing import CliRunner, Result

from passes.compress.msmodelslim import calibrate
from vlmconvert.cli import main
from vlmconvert.families import demo_checkpoint
from vlmconvert.pipeline import Helper

_run = Helper.run


def vlmconvert(*arguments: str | Path, input: str | None = None) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)


@pytest.fixture(scope="session", autouse=True)
def shared_helper():
    """One helper process for the conversions of a test process: importing transformers takes longer than most of them."""
    shared = Helper()

    def run(helper: Helper, function, *arguments):
        return _run(helper if function is calibrate else shared, function, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Helper, "run", run)
        yield
    shared.close()


@pytest.fixture
def own_helpers(monkeypatch: pytest.MonkeyPatch):
    """A helper process for each conversion, as it is outside of tests: nothing of one run can be seen by another."""
    monkeypatch.setattr(Helper, "run", _run)


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
