import re

import pytest

from manifests.errors import BadInputError
from tests.conftest import vlmconvert
from vlmconvert.conversion import forecast
from vlmconvert.conversion.forecast import Forecast, Resources, choose_resources
from vlmconvert.conversion.machine import Machine

GIB = 1 << 30


def expect(resources: Resources) -> Forecast:
    """A conversion of which a worker takes 2 GiB, and a sample that is computed 1 GiB."""
    return Forecast(GIB + (0 if resources.remote else 2 * resources.workers * GIB) + resources.at_once * GIB, 0, 0)


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    monkeypatch.setattr(forecast, "cores", lambda: 16)
    monkeypatch.setattr(forecast, "free_memory", lambda: 40 * GIB)


@pytest.mark.parametrize(
    ("workers", "remote", "limit", "chosen"),
    [
        (None, False, None, (16, 4)),
        (None, False, 12 * GIB, (5, 1)),
        (None, False, 13 * GIB, (5, 2)),
        (None, False, 4 * GIB, (1, 1)),
        (3, False, 12 * GIB, (3, 4)),
        (8, True, 4 * GIB, (8, 3)),
        (30, False, None, (30, 1)),
    ],
)
def test_what_fits_is_chosen(workers, remote, limit, chosen):
    resources, expected = choose_resources(workers, remote, 20, limit, expect)
    assert (resources.workers, resources.at_once, resources.remote, resources.memory) == (*chosen, remote, limit)
    assert expected == expect(resources)


@pytest.mark.parametrize(
    ("workers", "remote", "limit", "message"),
    [
        (None, False, 2 * GIB, r"this conversion needs 4GiB$"),
        (3, False, 7 * GIB, r"this conversion needs 8GiB, or 4GiB with --workers 1$"),
        (1, False, GIB, r"this conversion needs 4GiB$"),
        (8, True, GIB, r"this conversion needs 2GiB$"),
    ],
)
def test_what_fits_nothing_is_refused_with_what_would_do(workers, remote, limit, message):
    with pytest.raises(BadInputError, match=message) as refused:
        choose_resources(workers, remote, 20, limit, expect)
    needed = int(re.findall(r"needs (\d+)GiB", str(refused.value))[0]) * GIB
    choose_resources(workers, remote, 20, needed, expect)


def test_there_are_no_more_processes_than_blocks():
    assert choose_resources(None, False, 7, None, expect)[0].workers == 7


@pytest.mark.slow
def test_the_smallest_limit_that_is_named_does(store, tmp_path):
    options = ("--llm", "int4-awq", "--vision", "int8-ptq", "--dry-run", "--store", store, "-o", tmp_path / "out")
    refused = vlmconvert("mllama", *options, "--max-memory", "100MB")
    assert refused.exit_code == 2
    [needed] = re.findall(r"--max-memory is too small: this conversion needs ([\d.]+GiB)\n", refused.output)
    allowed = vlmconvert("mllama", *options, "--max-memory", needed)
    assert allowed.exit_code == 0, allowed.output


def figures(text: str) -> tuple[float, float]:
    """Memory in GiB and disk space in MB that a plan says."""
    memory, disk = re.findall(r"up to ([\d.]+) GiB of memory and ([\d.]+) MB of disk space", text)[0]
    return float(memory), float(disk)


def test_activations_count(store, tmp_path):
    """Every sample's activations are on the disk together, so they grow with the samples."""
    plans = {}
    for count in (10, 100):
        options = ("--llm", "int8", "--vision", "int8-ptq", "--vision-samples", count, "--dry-run", "--store", store)
        result = vlmconvert("mllama", *options, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output
        plans[count] = figures(result.output)
    assert plans[100][1] > 5 * plans[10][1]


def test_a_store_on_another_disk_needs_no_space_for_links(store, tmp_path, monkeypatch):
    """Files are linked from the store into the artifact, on one disk; otherwise they take space twice."""
    from vlmconvert.conversion import convert

    options = (
        "--llm",
        "int8",
        "--vision",
        "int8",
        "--no-validate",
        "--dry-run",
        "--store",
        store,
        "-o",
        tmp_path / "out",
    )
    one = vlmconvert("mllama", *options)
    monkeypatch.setattr(convert, "on_one_disk", lambda *_: False)
    two = vlmconvert("mllama", *options)
    assert figures(two.output)[1] > figures(one.output)[1]


def test_a_slower_machine_takes_longer(store, tmp_path, monkeypatch):
    from vlmconvert.conversion import convert

    def said(speed: float) -> str:
        machine = Machine(2, 8 * GIB, speed * 1e11, speed * 2e8, speed * 1e9)
        monkeypatch.setattr(convert, "measure_machine", lambda: machine)
        options = ("--llm", "int4-awq", "--vision", "int8-ptq", "--no-validate", "--dry-run", "--store", store)
        result = vlmconvert("mllama", *options, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output
        return re.findall(r"about \d+ (\w+)", result.output)[0]

    assert (said(1), said(1e-3)) == ("seconds", "minutes")
