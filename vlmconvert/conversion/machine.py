"""What this machine offers: cores, free memory, and how fast it computes."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.errors import BadInputError
from vlmconvert.options import parse_size

__all__ = ["Machine", "cores", "free_memory", "max_memory", "measure_machine"]

_LIMIT = "VLMCONVERT_MAX_MEMORY"
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Speed and size of a machine.

    Attributes:
        cores: number of cores that this process may use.
        memory: bytes of free memory.
        multiply: floating-point operations a second in float32 matrix products, with all cores.
        round: float32 values that one core rounds to 8 bit in a second.
        hash: bytes that one core hashes in a second.
    """

    cores: int
    memory: int
    multiply: float
    round: float
    hash: float


def measure_machine() -> Machine:
    """Measure the speed of this machine, which takes a third of a second."""
    values = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    rows = values[: 1 << 21].reshape(1024, 2048)
    multiply = _seconds(lambda: rows @ rows.T)
    rounding = _seconds(lambda: np.clip(np.round(values * 50), -128, 127).astype(np.int8))
    hashing = _seconds(lambda: hashlib.sha256(values.data))
    return Machine(
        cores(), free_memory(), 2 * len(rows) * rows.size / multiply, values.size / rounding, values.nbytes / hashing
    )


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of five tries, since others may use the machine at the same time."""
    tries = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        tries.append(time.perf_counter() - start)
    return min(tries)


def cores() -> int:
    """Number of cores that this process may use: its affinity and the limit of its container count."""
    from joblib import cpu_count

    return int(cpu_count())


def free_memory() -> int:
    """Bytes of memory that are free for this process: the limit of its container counts."""
    import psutil

    return min([psutil.virtual_memory().available, *_free_in_containers()])


def max_memory(text: str | None) -> int | None:
    """The limit for a conversion's memory in bytes, from the option or from the environment; None if there is none.

    Raises:
        BadInputError: if it is not a size, or not above 0.
    """
    name, value = ("--max-memory", text) if text is not None else (_LIMIT, os.environ.get(_LIMIT))
    if not value:
        if text is None:
            return None
        raise BadInputError(f"{name} is empty: write a size such as 8GiB")
    try:
        size = parse_size("max_memory", value)
    except BadInputError:
        raise BadInputError(f"{name} {value} is not a size: write it as 8GiB or 500MB") from None
    if size < 1:
        raise BadInputError(f"{name} {value} is too small: write a size such as 8GiB")
    return size


def _free_in_containers() -> Iterator[int]:
    """Free memory in each control group of this process that has a limit (version 2, and version 1 of containers)."""
    own = Path("/proc/self/cgroup")
    path = (
        next((line[3:] for line in own.read_text().splitlines() if line.startswith("0::")), "") if own.exists() else ""
    )
    folder = _CGROUPS / path.lstrip("/")
    groups = [
        (place, "memory.max", "memory.current") for place in (folder, *folder.parents) if place.is_relative_to(_CGROUPS)
    ]
    groups.append((_CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
    for place, limit, used in groups:
        try:
            most, now = (place / limit).read_text().strip(), int((place / used).read_text())
            statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit():  # "max" is no limit
            # Cached files can be dropped, so they do not count.
            yield max(0, int(most) - now + int(statistics.get("inactive_file", 0)))
