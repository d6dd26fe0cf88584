"""Compress on a Dask cluster of this machine, and print blocks per minute and the share of time that is not block work.

    python -m tests.benchmarks.cluster --workers 1,2

The checkpoint is a random mllama. Each worker keeps to one core, as a machine of its own would; the scheduler, the float chain
and everything else run on all of them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psutil
from distributed import Client, Scheduler

from tests.benchmarks.random_mllama import write_random_mllama

_DASK = Path(sys.executable).with_name("dask")
# Seconds after which workers have told the scheduler what they did.
_HEARTBEAT = 3
_IN_TASKS = {("thread-cpu", "seconds"), ("thread-noncpu", "seconds")}
_LOCAL = ("--no-dashboard", "--host", "127.0.0.1")


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[str]:
    """A scheduler and its workers; yields the address for --cluster."""
    file = folder / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([_DASK, "scheduler", "--port", "0", "--scheduler-file", file, *_LOCAL], **quiet)]
    while not file.exists() or not file.read_text().endswith("}"):
        time.sleep(0.1)
    worker = (_DASK, "worker", "--scheduler-file", file, "--nthreads", "1", "--no-nanny", *_LOCAL)
    for number in range(workers):
        running.append(subprocess.Popen([*worker, "--local-directory", folder / str(number)], **quiet))
        psutil.Process(running[-1].pid).cpu_affinity([number % (os.cpu_count() or 1)])
    try:
        yield json.loads(file.read_text())["address"].replace("tcp://", "dask://")
    finally:
        for process in running:
            process.kill()
            process.wait()


def block_seconds(dask_scheduler: Scheduler) -> float:
    """Seconds that all workers together have spent in tasks: on the processor, or waiting in the task."""
    return sum(
        value
        for key, value in dask_scheduler.cumulative_worker_metrics.items()
        if isinstance(key, tuple) and key[0] == "execute" and key[-2:] in _IN_TASKS
    )


@click.command(help=__doc__)
@click.option("--layers", default=12, show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--workers", default="1,2", show_default=True, help="Numbers of workers, separated by commas.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/benchmarks"), show_default=True)
def main(layers: int, samples: int, workers: str, work: Path) -> None:
    """Convert with each number of workers, and print a line for each."""
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores")
    folder = work / f"mllama-{layers}"
    if not (folder / "model.safetensors.index.json").exists():
        write_random_mllama(folder, layers=layers)
    first = 0.0
    for count in (int(part) for part in workers.split(",")):
        with tempfile.TemporaryDirectory(dir=work) as temporary, cluster(count, Path(temporary)) as address:
            places = ("--store", f"{temporary}/store", "-o", f"{temporary}/artifact", "--cluster", address)
            options = ("--llm", "int4-awq", "--vision", "int8", "--samples", str(samples), "--no-validate")
            command = [sys.executable, "-m", "vlmconvert", "mllama", str(folder), *options, *places]
            start = time.monotonic()
            output = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            wall = time.monotonic() - start
            time.sleep(_HEARTBEAT)
            with Client(address.replace("dask://", "tcp://")) as client:
                in_blocks = client.run_on_scheduler(block_seconds)
        stages = re.findall(
            r"^(language model|vision encoder): compress-[\w-]+: (?:(\d+) steps|([\d.]+) s)", output, re.MULTILINE
        )
        blocks = sum(int(steps) for _, steps, _ in stages if steps)
        busy = sum(float(seconds) for *_, seconds in stages if seconds)
        rate = blocks / busy * 60
        first = first or rate
        click.echo(
            f"{count} workers: {rate:.1f} blocks a minute, {rate / first:.2f} of the first; of the workers' time then, "
            f"{1 - in_blocks / busy / count:.0%} is not block work; {wall:.1f} s in all, {1 - busy / wall:.0%} before and after"
        )


if __name__ == "__main__":
    main()
