"""Running a block pass on many blocks in parallel, on this machine or on a cluster."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from manifests.errors import BadInputError, ConversionError
from passes.base import named_failure
from passes.block_pass import BlockPass
from passes.compat.loky import worker_number
from passes.compat.nncf import without_torch
from passes.export.template import BlockSource
from passes.store import Store
from passes.vocabulary import Component
from vlmconvert.conversion.workers import Check, Workers

__all__ = ["make_blocks"]

# Roles of the blocks with a weight for each token of the vocabulary.
_LONG = {"embeddings", "head"}


def make_blocks(
    item: BlockPass,
    component: Component,
    keys: Mapping[int, str],
    source: Callable[[int], BlockSource],
    store: Store,
    workers: Workers,
) -> Iterator[int]:
    """Run a block pass on blocks, and store the results; yields the number of each block when it is finished.

    Args:
        item: the pass.
        component: component that the blocks belong to.
        keys: number of a block -> its key in the store.
        source: gives the pass's input for a block; it is called when the block is about to run.
        store: keeps the results.
        workers: the processes.

    Raises:
        ConversionError: if the pass failed on a block, or a process died.
    """
    from joblib import delayed

    blocks = component.blocks
    missing = list(keys)
    # Blocks that need activations keep their order, in which the activations flow. Embeddings and LM head come first: they take
    # long, and at the end they would keep a single worker busy.
    missing.sort(key=lambda index: 2 if item.needs_activations(role := blocks[index].role) else role not in _LONG)
    failure: list[BaseException] = []
    cores = 0 if workers.remote else workers.count

    def tasks() -> Iterator[Any]:
        # joblib calls this generator in a thread that ignores exceptions.
        try:
            for index in missing:
                made = source(index)
                yield delayed(_make_block)(store, keys[index], item, component.name, made, index, cores, workers.check)
        except BaseException as error:
            failure.append(error)

    try:
        yield from workers.run(tasks())
    except workers.deaths as error:
        raise ConversionError(
            f"pass {item.name}: a worker died while it made blocks of {component.name}; if it ran out of memory, use "
            "--max-memory or fewer workers: what is finished is kept, and the next run goes on from there"
        ) from error
    if failure:
        raise failure[0]


def _make_block(
    store: Store,
    key: str,
    item: BlockPass,
    component: str,
    source: BlockSource,
    index: int,
    sharing: int,
    check: Check | None,
) -> int:
    _keep_to_own_cores(sharing)
    if check is not None:
        _check_worker(check)
    with named_failure(item, component, source.block.name), nullcontext() if item.needs_torch else without_torch():
        store.get_or_make(
            key, lambda output: item.run(source, output), f"{item.name}: {component}, block {source.block.name}"
        )
    _give_memory_back()
    return index


def _check_worker(check: Check) -> None:
    """Refuse work in a process of a cluster that is not as it must be; it may have joined after the others were checked."""
    process = multiprocessing.current_process()
    if getattr(process, "checked", None) == check.secret:
        return
    if (problem := check.problem()) is not None:
        raise BadInputError(f"worker {platform.node()} cannot work: {problem}")
    process.checked = check.secret  # type: ignore[attr-defined]


def _give_memory_back() -> None:
    """Return unused memory to the system, which glibc otherwise keeps for the process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _keep_to_own_cores(workers: int) -> None:
    """Restrict one of several worker processes on this machine to its share of the cores.

    Otherwise OpenVINO would start a thread for every core in each worker. Only Linux lets a process choose its cores;
    on other systems, all workers use all cores.
    """
    process = multiprocessing.current_process()
    if not hasattr(os, "sched_setaffinity") or hasattr(process, "own_cores"):
        return
    cores = sorted(os.sched_getaffinity(0))
    number = worker_number()
    if number is not None and len(cores) > workers - 1 > 0:
        os.sched_setaffinity(0, cores[number % workers :: workers])
        process.own_cores = True  # type: ignore[attr-defined]
