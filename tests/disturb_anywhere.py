"""Fill the disk of conversions, or take their files away, at random moments; then run them again, and compare the artifacts.

    python -m tests.disturb_anywhere --moments 10

A disturbed conversion ends with one sentence and exit code 2 or 3, or is complete. What an earlier run had put at the output is
whole. When the cause is gone, the same command finishes with the bytes of an undisturbed run, and leaves no temporary file.
The disk is a small one in memory, which a user may mount in a namespace of their own.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from tests.kill_anywhere import OPTIONS, Case
from vlmconvert.families import demo_checkpoint

_DISK = "400M"
_POLL = 0.002  # seconds


@contextmanager
def full_disk(work: Path) -> Iterator[None]:
    """Leave no space on a disk during the `with` block."""
    filler = work / "filler"
    with filler.open("wb") as stream:
        while (free := shutil.disk_usage(work).free) > 0:
            try:
                os.posix_fallocate(stream.fileno(), stream.seek(0, os.SEEK_END), free)
            except OSError:
                break  # the conversion has written meanwhile
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def vanished(path: Path) -> Iterator[None]:
    """Take a file or a folder away during the `with` block."""
    aside = path.with_name(f"{path.name} aside")
    there = path.exists()
    if there:
        path.rename(aside)
    try:
        yield
    finally:
        if there:
            if path.is_dir():
                shutil.rmtree(path)  # what the conversion has made there meanwhile
            aside.rename(path)


@contextmanager
def shortened(path: Path) -> Iterator[None]:
    """Cut a file in the middle during the `with` block."""
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    try:
        yield
    finally:
        path.write_bytes(content)


@contextmanager
def without_staging(place: Path) -> Iterator[None]:
    """Remove the folder in which the artifact is put together."""
    for folder in place.glob(".vlmconvert-*"):
        shutil.rmtree(folder, ignore_errors=True)
    yield


def disturbances(case: Case) -> dict[str, Callable[[], object]]:
    """Name -> context manager of everything that is done to a conversion, in the order in which moments take their turns."""
    place, model = case.work / "killed", case.model
    assert model is not None
    return {
        "full disk": partial(full_disk, case.work),
        "weights vanish": partial(vanished, model / "model.safetensors"),
        "full disk again": partial(full_disk, case.work),
        "weights are cut": partial(shortened, model / "model.safetensors"),
        "config.json vanishes": partial(vanished, model / "config.json"),
        "tokenizer.json vanishes": partial(vanished, model / "tokenizer.json"),
        "the store vanishes": partial(vanished, place / "store"),
        "the staging folder vanishes": partial(without_staging, place),
    }


def disturb(case: Case, name: str, grown: int) -> str:
    """Disturb a run once the disk has `grown` by so many bytes; returns what came of it."""
    used = shutil.disk_usage(case.work).used
    running = case.start()
    before = used + case.copied
    while running.poll() is None and shutil.disk_usage(case.work).used - before < grown:
        time.sleep(_POLL)
    with disturbances(case)[name]():  # type: ignore[attr-defined]
        said, _ = running.communicate(timeout=600)
    assert running.returncode in (0, 2, 3), f"{name}: exit {running.returncode}\n{said}"
    if running.returncode:
        last = said.strip().splitlines()[-1]
        assert "Traceback" not in said, f"{name}\n{said}"
        assert "--debug" not in last, f"{name}: nobody has thought of {last}"
        outcome = f"exit {running.returncode}: {last}"
    else:
        outcome = "finished"
    case.check_earlier()
    case.go_on()
    return outcome


def main_in_namespace(arguments: list[str]) -> int:
    """Run this module where it may mount a disk in memory."""
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", "tests.disturb_anywhere"]
    return subprocess.run([*command, "--mounting", *arguments], check=False).returncode


@click.command(help=__doc__)
@click.option("--moments", default=10, show_default=True, help="Number of disturbances for each target.")
@click.option("--target", "targets", multiple=True, default=tuple(OPTIONS), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--mounting", is_flag=True, hidden=True)
def main(moments: int, targets: tuple[str, ...], seed: int, mounting: bool) -> None:
    """Print a line for each disturbance."""
    if not mounting:
        sys.exit(main_in_namespace(sys.argv[1:]))
    for target in targets:
        chance = random.Random(f"{seed} {target}")
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", folder], check=True)
            try:
                model = work / "checkpoint"
                source = demo_checkpoint("llava")
                assert source is not None
                shutil.copytree(source, model)
                case = Case(target, work, model=model)
                case.prepare()
                names = list(disturbances(case))
                for number in range(moments):
                    name, grown = names[number % len(names)], int(chance.uniform(0, 1) * case.grown)
                    click.echo(
                        f"{target}: {name} after {grown / 1e6:.2f} of {case.grown / 1e6:.2f} MB: {disturb(case, name, grown)}"
                    )
            finally:
                subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    main()
