from __future__ import annotations

import time

import psutil
from joblib import Parallel, delayed
from loky import ProcessPoolExecutor

from passes.compat.loky import end_processes, worker_number


def test_joblibs_workers_have_numbers():
    assert worker_number() is None
    numbers = Parallel(n_jobs=2)(delayed(worker_number)() for _ in range(4))
    assert all(isinstance(number, int) for number in numbers), (
        "joblib's processes are no longer called LokyProcess-<number>: every worker would start a thread on every core"
    )


def test_a_working_process_is_ended_at_once():
    pool = ProcessPoolExecutor(1)
    process = psutil.Process(pool.submit(_pid).result())
    pool.submit(time.sleep, 60)
    end_processes(pool, wait=False)
    _, alive = psutil.wait_procs([process], timeout=10)
    assert not alive, "shutdown(kill_workers=True) leaves processes behind: helper processes would outlive a conversion"


def test_a_process_may_end_by_itself():
    pool = ProcessPoolExecutor(1)
    process = psutil.Process(pool.submit(_pid).result())
    end_processes(pool, wait=True)
    assert not process.is_running()


def _pid() -> int:
    return psutil.Process().pid
