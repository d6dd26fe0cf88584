"""Processes that make blocks: on this machine, or on a cluster, in both cases through joblib.

A cluster's workers share the store and the checkpoint with this machine, under the same paths. They execute what this process
sends them, as every Dask or Ray cluster does, so the network between them must be trusted.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
import re
import secrets
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from manifests.network import check_reachable
from passes.compat.loky import end_with_parent
from passes.store import Store, library_versions
from vlmconvert.version import __version__

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Check", "LocalWorkers", "Workers", "connect", "parse_cluster"]

_WAIT = 30  # seconds for a scheduler to answer, and for a first worker
_ADDRESS = re.compile(r"(?P<kind>[a-z]+)://(?P<host>[^/\s:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})/?")
# Distributions whose versions must be the same everywhere, in addition to the libraries that results depend on.
_SAME = ("joblib", "cloudpickle")


@dataclass(frozen=True)
class Check:
    """What a worker must have in common with the machine that gives it work; picklable.

    Attributes:
        versions: name -> version of Python and of the packages that results depend on.
        secret: a file in the store, whose content is its name.
        files: file of the checkpoint -> bytes.
    """

    versions: Mapping[str, str]
    secret: Path
    files: Mapping[Path, int]

    @classmethod
    def of(cls, store: Store, files: Mapping[Path, int], distributions: tuple[str, ...]) -> Check:
        """What this machine has; it leaves a file in the store that its workers must see."""
        store.root.mkdir(parents=True, exist_ok=True)
        name = f".cluster-{secrets.token_hex(8)}"
        (store.root / name).write_text(name, encoding="utf-8")
        return cls(_versions(distributions), store.root / name, files)

    def close(self) -> None:
        """Remove the file from the store."""
        self.secret.unlink(missing_ok=True)

    def problem(self) -> str | None:
        """What is wrong with this process as a worker, and the mend; None if it is a good one."""
        own = _versions(tuple(self.versions))
        for name, wanted in self.versions.items():
            if own.get(name) != wanted:
                has = f"{name} {own[name]}" if name in own else f"no {name}"
                return f"it has {has} where this machine has {wanted}: install the same versions on all machines"
        try:
            same = self.secret.read_text(encoding="utf-8") == self.secret.name
        except OSError:
            same = False
        if not same:
            return (
                f"it does not see the store {self.secret.parent}: share the folder under the same path on all machines"
            )
        for path, size in self.files.items():
            if not path.is_file() or path.stat().st_size != size:
                return f"it does not see the checkpoint's file {path}: share the folder under the same path on all machines"
        return None


def _versions(distributions: tuple[str, ...]) -> dict[str, str]:
    own = {"python": platform.python_version(), "vlmconvert": __version__}
    return own | library_versions(*(name for name in (*_SAME, *distributions) if name not in own))


class Workers(ABC):
    """Processes that make blocks.

    Attributes:
        count: number of blocks that are made at the same time.
        check: what a worker checks before it takes work; None for processes of this machine.
    """

    count: int
    check: Check | None = None

    @property
    @abstractmethod
    def deaths(self) -> tuple[type[Exception], ...]:
        """What `run` raises if a process has died, and none can take its work."""

    @property
    def remote(self) -> bool:
        """Whether the processes take no memory of this machine, since a cluster has them."""
        return self.check is not None

    @abstractmethod
    def run(self, tasks: Iterator[Any]) -> Iterator[Any]:
        """Run tasks of `joblib.delayed`; yields their results in the order in which they finish.

        Args:
            tasks: pulled one by one, when a worker is about to be free.
        """


@dataclass(frozen=True)
class LocalWorkers(Workers):
    """Processes on this machine."""

    count: int = 1
    check: None = None

    @property
    def deaths(self) -> tuple[type[Exception], ...]:
        return (BrokenProcessPool,)

    def run(self, tasks: Iterator[Any]) -> Iterator[Any]:
        return _unordered(self.count, tasks, initializer=end_with_parent)


def _unordered(count: int, tasks: Iterator[Any], **backend: Any) -> Iterator[Any]:
    from joblib import Parallel

    parallel = Parallel(
        n_jobs=count, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs + 1", **backend
    )
    results: Iterator[Any] = parallel(tasks)
    return results


def _ahead(submit: Callable[..., Callable[[], Any]], tasks: Iterator[Any]) -> Iterator[Any]:
    """Run tasks on the only worker of a cluster: joblib would run them in this process.

    Args:
        submit: gives a function with its arguments to the cluster; returns a function that waits for the result.
        tasks: the tasks; the next one is prepared while the worker has one.
    """
    pending: deque[Callable[[], Any]] = deque()
    for task, given, named in tasks:
        pending.append(submit(task, *given, **named))
        if len(pending) > 1:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


class _DaskWorkers(Workers):
    """The workers of a Dask cluster. A task whose worker dies is given to another one by the scheduler."""

    def __init__(self, client: Client, address: str, check: Check) -> None:
        self._client, self.check = client, check
        try:
            client.wait_for_workers(1, timeout=_WAIT)
        except TimeoutError:
            raise BadInputError(
                f"--cluster {address} has no workers: start some with dask worker --nthreads 1 {address.partition('://')[2]}"
            ) from None
        threads = client.nthreads()
        if crowded := [worker for worker, number in threads.items() if number > 1]:
            raise BadInputError(
                f"worker {crowded[0]} of --cluster {address} makes several blocks in one process: start it with --nthreads 1"
            )
        _refuse(address, client.run(check.problem, on_error="return"))
        self.count = len(threads)

    @property
    def deaths(self) -> tuple[type[Exception], ...]:
        from distributed import KilledWorker

        return (KilledWorker,)

    def run(self, tasks: Iterator[Any]) -> Iterator[Any]:
        from joblib import parallel_config

        if self.count == 1:
            return _ahead(
                lambda task, *given, **named: self._client.submit(task, *given, pure=False, **named).result, tasks
            )
        with parallel_config(backend="dask", client=self._client, wait_for_workers_timeout=_WAIT):
            return _unordered(self.count, tasks)


class _RayWorkers(Workers):
    """The processes of a Ray cluster, one for each of its cores; joblib's Ray backend takes some tasks and returns all results."""

    def __init__(self, address: str, check: Check, count: int) -> None:
        from joblib import delayed

        self.count, self.check = count, check
        checks = [delayed(check.problem)() for _ in range(count)]
        _refuse(address, dict(enumerate(self.run(iter(checks)))))

    @property
    def deaths(self) -> tuple[type[Exception], ...]:
        from ray.exceptions import RayError

        return (RayError,)

    def run(self, tasks: Iterator[Any]) -> Iterator[Any]:
        import ray
        from joblib import Parallel, parallel_config

        if self.count == 1:
            remote = ray.remote(num_cpus=1)(_call)

            def submit(*given: Any, **named: Any) -> Callable[[], Any]:
                return partial(ray.get, remote.remote(*given, **named))

            yield from _ahead(submit, tasks)
            return
        with parallel_config(backend="ray", n_jobs=self.count, ray_remote_args={"num_cpus": 1}):
            parallel = Parallel(batch_size=1)
        with parallel:
            while batch := list(islice(tasks, 2 * self.count)):
                yield from parallel(batch)


def _call(task: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Ray takes only functions written in Python."""
    return task(*given, **named)


def _refuse(address: str, found: Mapping[Any, Any]) -> None:
    """Refuse a cluster of which a worker has a problem, or could not look for one."""
    for worker, problem in found.items():
        if problem is not None:
            if isinstance(problem, BaseException):
                problem = f"it failed with {problem}: install vlmconvert there"
            raise BadInputError(f"worker {worker} of --cluster {address} cannot work: {problem}")


@contextmanager
def _dask(address: str, check: Check) -> Iterator[Workers]:
    from distributed import Client

    try:
        client = Client(address.replace("dask://", "tcp://"), timeout=_WAIT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BadInputError(f"--cluster {address} cannot be reached: start dask scheduler there") from error
    with client:
        yield _DaskWorkers(client, address, check)


@contextmanager
def _ray(address: str, check: Check) -> Iterator[Workers]:
    import ray
    from ray.util.joblib import register_ray

    try:
        ray.init(address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, OSError) as error:
        raise BadInputError(f"--cluster {address} cannot be reached: start ray start --head there") from error
    try:
        register_ray()
        logging.getLogger("ray.util.multiprocessing").setLevel(
            logging.ERROR
        )  # joblib passes an argument that it ignores
        count = int(ray.cluster_resources().get("CPU", 0))
        if not count:
            raise BadInputError(f"--cluster {address} has no cores for work: start its nodes with --num-cpus")
        yield _RayWorkers(address, check, count)
    finally:
        ray.shutdown()


_KINDS: dict[str, tuple[str, Callable[[str, Check], AbstractContextManager[Workers]]]] = {
    "dask": ("distributed", _dask),
    "ray": ("ray", _ray),
}


def parse_cluster(address: str) -> None:
    """Refuse the address of a cluster that cannot be one.

    Raises:
        BadInputError: if it is not an address of a known kind, --offline forbids it, or the kind's library is not installed.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or match["kind"] not in _KINDS or not 0 < int(match["port"]) < 65536:
        raise BadInputError(f"--cluster {address} is not an address: write dask://HOST:PORT or ray://HOST:PORT")
    check_reachable("cluster", address)
    package, _ = _KINDS[match["kind"]]
    if importlib.util.find_spec(package) is None:
        raise BadInputError(f'--cluster {address} needs {package}: pip install "vlmconvert[{match["kind"]}]"')


@contextmanager
def connect(address: str, check: Check) -> Iterator[Workers]:
    """Connect to a cluster, and check its workers.

    Args:
        address: `dask://HOST:PORT` of a scheduler, or `ray://HOST:PORT` of a head node.
        check: what the workers must have.

    Raises:
        BadInputError: if the cluster does not answer, has no workers, or a worker does not have what it must have.
    """
    _, open_cluster = _KINDS[address.partition("://")[0]]
    try:
        with open_cluster(address, check) as workers:
            yield workers
    finally:
        check.close()
