import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed import LocalCluster
from joblib import delayed

from manifests.errors import BadInputError, ConversionError
from passes.block_pass import SplitBlocks
from passes.compress.weights import CompressInt8Pass
from passes.store import Store
from tests.conftest import vlmconvert
from tests.models import opened_model
from vlmconvert.conversion import schedule, workers
from vlmconvert.conversion.schedule import make_blocks
from vlmconvert.conversion.workers import Check, LocalWorkers, connect, parse_cluster

OPTIONS = ("--llm", "int4-awq", "--vision", "int8-ptq", "--samples", 2, "--vision-samples", 2, "--no-validate")


@contextmanager
def started(*commands):
    """Processes that end with the test, each with its children."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(list(map(str, command)), start_new_session=True, **quiet) for command in commands]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(condition):
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.fixture
def check(tmp_path):
    """What the workers of a test must have: they run on this machine."""
    made = Check.of(Store(tmp_path / "store"), {}, ())
    yield made
    made.close()


@pytest.mark.slow
def test_a_dask_cluster_makes_the_same_bytes_though_a_worker_dies(build, tmp_path):
    file, store = tmp_path / "scheduler.json", tmp_path / "store"
    dask = Path(sys.executable).with_name("dask")
    common = ("--no-dashboard", "--host", "127.0.0.1")
    worker = (dask, "worker", "--scheduler-file", file, "--nthreads", 1, "--no-nanny", *common)
    with started((dask, "scheduler", "--port", 0, "--scheduler-file", file, *common)):
        until(lambda: file.exists() and file.read_text().endswith("}"))
        address = json.loads(file.read_text())["address"].replace("tcp://", "dask://")
        folders = [("--local-directory", tmp_path / str(number)) for number in range(2)]
        with started(*((*worker, *folder) for folder in folders)) as processes:

            def kill() -> None:
                until(lambda: len(list(store.glob("??/*/block.xml"))) >= 5)
                processes[0].kill()

            watcher = threading.Thread(target=kill)
            watcher.start()
            result = vlmconvert("mllama", *OPTIONS, "--cluster", address, "--store", store, "-o", tmp_path / "out")
            watcher.join()
            assert result.exit_code == 0, result.output
            assert processes[0].poll() is not None
            assert processes[1].poll() is None
    local = build(*OPTIONS)
    names = {path.name for path in local.iterdir()} - {"run.json"}
    assert names == {path.name for path in (tmp_path / "out").iterdir()} - {"run.json"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (local / name).read_bytes(), name
    assert not list(store.glob(".cluster-*"))


@contextmanager
def dask_cluster(**options):
    with LocalCluster(processes=False, protocol="tcp://", dashboard_address=None, **options) as cluster:
        yield cluster.scheduler_address.replace("tcp://", "dask://")


@dataclass(frozen=True)
class Dies(CompressInt8Pass):
    """Its process ends while it makes the third block."""

    def run(self, source, output):
        if source.block.name.endswith("layers.1"):
            os._exit(9)
        super().run(source, output)


@pytest.mark.slow
def test_a_dead_process_of_this_machine_is_said_and_what_is_finished_is_kept(demo, store, tmp_path):
    model, kept = opened_model(demo, store), Store(tmp_path)
    component = model.components[-1]
    split = SplitBlocks(component, model.checkpoint, model.templates, "")
    keys = {index: str(index).zfill(64) for index in range(6)}
    message = "pass compress-int8: a worker died while it made blocks of language_model; if it ran out of memory, use"
    with pytest.raises(ConversionError, match=message):
        list(make_blocks(Dies(), component, keys, split.source, kept, LocalWorkers(2)))
    assert [index for index, key in keys.items() if key in kept]


def test_dask_workers_give_results_as_they_finish(check):
    with dask_cluster(n_workers=2, threads_per_worker=1) as address, connect(address, check) as found:
        assert (found.count, found.remote) == (2, True)
        pulled = []

        def tasks():
            for number in range(20):
                pulled.append(number)
                yield delayed(pow)(number, 2)

        results = found.run(tasks())
        first = next(results)
        assert len(pulled) < 20
        assert sorted([first, *results]) == [number**2 for number in range(20)]


def test_the_only_worker_of_a_cluster_gets_the_work(check):
    with dask_cluster(n_workers=1, threads_per_worker=1) as address, connect(address, check) as found:
        threads = set(found.run(delayed(threading.get_ident)() for _ in range(3)))
    assert threading.get_ident() not in threads


@pytest.mark.exhaustive
@pytest.mark.parametrize("cores", [1, 2])
def test_ray_workers_give_the_same_results(cores, check, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    ray = Path(sys.executable).with_name("ray")
    options = (
        "--num-cpus",
        cores,
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--node-ip-address",
        "127.0.0.1",
    )
    head = (ray, "start", "--head", "--block", "--port", ports[0], "--ray-client-server-port", ports[1], *options)
    address = f"ray://127.0.0.1:{ports[1]}"
    with started(head):
        until(lambda: socket.socket().connect_ex(("127.0.0.1", ports[1])) == 0)
        with connect(address, check) as found:
            assert (found.count, found.remote) == (cores, True)
            assert sorted(found.run(delayed(pow)(number, 2) for number in range(6))) == [0, 1, 4, 9, 16, 25]
            assert os.getpid() not in found.run(delayed(os.getpid)() for _ in range(2))
        other = Check({"numpy": "0.1"}, check.secret, {})
        with pytest.raises(BadInputError, match=r"has numpy .* where this machine has 0\.1"), connect(address, other):
            pass


@pytest.mark.parametrize(
    "address",
    [
        "",
        "head:8786",
        "tcp://head:8786",
        "dask://head",
        "dask://:8786",
        "dask://head:0",
        "dask://head:99999",
        "dask://a b:1",
    ],
)
def test_what_is_no_address_is_refused_before_anything_else(address, tmp_path):
    result = vlmconvert("mllama", tmp_path / "missing", "--cluster", address, "--store", tmp_path / "store")
    assert result.exit_code == 2
    assert "is not an address: write dask://HOST:PORT or ray://HOST:PORT" in result.output
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", 2), "--workers does not go with --cluster"),
        (("--target", "ascend", "--llm", "w8a16"), "--cluster does not go with --target ascend, which has no blocks"),
    ],
)
def test_options_that_contradict_a_cluster(options, message, tmp_path):
    result = vlmconvert("mllama", "--cluster", "dask://127.0.0.1:1", *options, "--store", tmp_path / "store")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "store").exists()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r'needs distributed: pip install "vlmconvert\[dask\]"'):
        parse_cluster("dask://head:8786")
    with pytest.raises(BadInputError, match=r'needs ray: pip install "vlmconvert\[ray\]"'):
        parse_cluster("ray://head:10001")


def test_a_cluster_that_does_not_answer(store, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_WAIT", 0.5)
    options = ("--llm", "int8", "--vision", "int8", "--cluster", "dask://127.0.0.1:1", "--store", store)
    result = vlmconvert("mllama", *options, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--cluster dask://127.0.0.1:1 cannot be reached: start dask scheduler there" in result.output
    assert not (tmp_path / "out").exists()
    assert not list(store.glob(".cluster-*"))


def test_a_cluster_without_workers(check, monkeypatch):
    monkeypatch.setattr(workers, "_WAIT", 1)
    with (
        dask_cluster(n_workers=0) as address,
        pytest.raises(BadInputError, match="has no workers: start some with dask worker --nthreads 1"),
        connect(address, check),
    ):
        pass


def test_a_worker_with_several_threads(check):
    with (
        dask_cluster(n_workers=1, threads_per_worker=2) as address,
        pytest.raises(BadInputError, match="makes several blocks in one process: start it with --nthreads 1"),
        connect(address, check),
    ):
        pass


def test_a_worker_that_differs_is_refused(check):
    other = Check({**check.versions, "openvino": "1.0"}, check.secret, {})
    with (
        dask_cluster(n_workers=1, threads_per_worker=1) as address,
        pytest.raises(
            BadInputError, match=r"it has openvino .* where this machine has 1\.0: install the same versions"
        ),
        connect(address, other),
    ):
        pass


def test_what_a_worker_must_share(check, tmp_path):
    assert check.problem() is None
    assert {"python", "vlmconvert", "openvino", "nncf", "numpy"} <= check.versions.keys()
    assert "no antigravity" in Check({"antigravity": "1"}, check.secret, {}).problem()
    weights = tmp_path / "model.safetensors"
    for size in (0, 2):
        assert f"the checkpoint's file {weights}" in Check(check.versions, check.secret, {weights: size}).problem()
        weights.write_bytes(bytes(1))
    assert Check(check.versions, check.secret, {weights: 1}).problem() is None
    check.close()
    assert f"does not see the store {tmp_path / 'store'}" in check.problem()


def test_a_worker_that_joins_later_checks_itself_once(check, monkeypatch):
    schedule._check_worker(check)
    monkeypatch.setattr(Check, "problem", lambda self: "it is asked again")
    schedule._check_worker(check)
    with pytest.raises(BadInputError, match="cannot work: it is asked again"):
        schedule._check_worker(Check(check.versions, check.secret.with_name("another"), {}))
