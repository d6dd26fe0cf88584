"""Kill conversions at random moments, run them again, and compare the artifacts with those of undisturbed runs.

    python -m tests.kill_anywhere --moments 30

After each kill: no process of the run is left; what an earlier run had put at the output is whole; the same command finishes, makes
no finished block again, gives the same bytes, and leaves no temporary file behind.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil

from vlmconvert.families import demo_checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
OPTIONS = {
    "openvino": (
        "--llm",
        "int4-awq",
        "--vision",
        "int8-ptq",
        "--samples",
        "4",
        "--vision-samples",
        "4",
        "--workers",
        "2",
    ),
    "onnx": ("--llm", "int4", "--vision", "int8", "--workers", "2"),
    "ascend": ("--llm", "w8a16", "--shard-size", "300kB", "--workers", "2"),
}


@dataclass
class Case:
    """A conversion of the demo that is killed again and again.

    Attributes:
        target: the target.
        work: a folder of its own.
        model: checkpoint to convert; None is the demo.
        seconds: seconds that an undisturbed run takes.
        total: number of blocks that it makes.
        grown: bytes by which it makes the folder grow.
        copied: bytes of the folder that each run starts with.
        patience: seconds in which all processes of a run must have ended after a signal.
        before, expected: hashes of the artifact that is at the output before the kill, and of the undisturbed one.
    """

    target: str
    work: Path
    model: Path | None = None
    patience: float = 3.0
    seconds: float = 0.0
    total: int = 0
    grown: int = 0
    copied: int = 0
    before: dict[str, str] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)

    def command(self, name: str) -> list[str]:
        """The command that writes `name`, with a store of the same name."""
        places = ["-o", str(self.work / name / "out"), "--store", str(self.work / name / "store")]
        options = [*OPTIONS[self.target], "--no-validate", "--force"]
        return [*self._start(), "--target", self.target, *options, *places]

    def _start(self) -> list[str]:
        model = [] if self.model is None else [str(self.model)]
        return [sys.executable, "-m", "vlmconvert", "llava", *model]

    def prepare(self) -> None:
        """Make the earlier artifact, a store that has what every run needs, and the undisturbed artifact."""
        earlier = [
            *self._start(),
            "--target",
            "openvino",
            "--llm",
            "int8",
            "--vision",
            "fp16",
            "--no-validate",
        ]
        _run([*earlier, *self.command("kept")[-4:]])
        # Traces and the like take most of the time of a run, and have no blocks to kill.
        _run([*self.command("kept"), "--dry-run"])
        shutil.copytree(self.work / "kept", self.work / "whole", symlinks=True)
        start = time.monotonic()
        self.total = _made(_run(self.command("whole")))
        self.seconds = time.monotonic() - start
        self.copied = _size(self.work / "kept")
        self.grown = _size(self.work / "whole") - self.copied
        self.expected = hashes(self.work / "whole" / "out")
        self.before = hashes(self.work / "kept" / "out")

    def start(self) -> subprocess.Popen[str]:
        """Start a run in a fresh copy of what every run starts with."""
        place = self.work / "killed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.work / "kept", place, symlinks=True)
        return subprocess.Popen(self.command("killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def check_earlier(self) -> None:
        """Check that the earlier artifact is whole, if the new one is not yet there."""
        place = self.work / "killed"
        found = hashes(place / "out")
        replacing = [hashes(path) for path in place.glob(".vlmconvert-replaced-*/out")]
        assert self.before in (found, *replacing) or found == self.expected, (
            f"the earlier artifact is not whole, and the new one differs in {_differing(found, self.expected)}"
        )

    def go_on(self) -> int:
        """Run the command again, and compare with the undisturbed artifact; returns the number of blocks that it made."""
        place = self.work / "killed"
        again = _run(self.command("killed"))
        assert not (other := _differing(hashes(place / "out"), self.expected)), f"other bytes than undisturbed: {other}"
        assert not (found := leftovers(place)), f"left behind: {found}"
        return _made(again)

    def kill(self, number: int, moment: float) -> str:
        """Kill a run, and check what it leaves; returns what had happened by then."""
        running = self.start()
        time.sleep(moment)
        children = _children(running.pid)
        running.send_signal(number)
        start = time.monotonic()
        said, _ = running.communicate(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=max(0.0, self.patience - (time.monotonic() - start)))
        living = [process.cmdline() for process in alive if not _ended(process)]
        assert not living, f"{len(living)} processes live {self.patience} s after signal {number}: {living}"
        assert number == signal.SIGKILL or time.monotonic() - start <= self.patience, (
            f"it took {time.monotonic() - start:.1f} s"
        )
        ended = (
            hashes(self.work / "killed" / "out") == self.expected
        )  # the interpreter itself was ending, if not by itself
        if running.returncode not in (0, -number if ended or number == signal.SIGKILL else 0):
            assert running.returncode == 128 + number, (running.returncode, said)
            assert "stopped by" in said, said
        self.check_earlier()
        finished = _blocks(self.work / "killed" / "store")
        made = self.go_on()
        assert made <= max(0, self.total - finished) or not finished, (
            f"{finished} blocks were finished, {made} made again"
        )
        return f"exit {running.returncode}, {finished} blocks finished"


def hashes(folder: Path) -> dict[str, str]:
    """File -> SHA-256 of an artifact, but for the log of the run."""
    files = sorted(folder.rglob("*")) if folder.exists() else []
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.name != "run.json"
    }


def _differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(place: Path) -> list[str]:
    """Names of temporary files and folders."""
    return [path.name for path in place.rglob(".*") if path.name.startswith((".vlmconvert-", ".making-", ".pieces-"))]


def _ended(process: psutil.Process) -> bool:
    """Whether a process has ended, though nobody may have asked for its exit status yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _size(folder: Path) -> int:
    """Bytes on the disk of all files; those with several names count once."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sum({status.st_ino: status.st_blocks * 512 for status in found}.values())


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _blocks(store: Path) -> int:
    """Number of finished blocks or segments in a store; their labels lie beside them, and are written first."""
    labels = (path.read_text() for path in store.glob("??/*.txt") if path.with_suffix("").is_dir())
    ours = [label for label in labels if "activations" not in label and "statistics" not in label]
    return sum(", block " in label or "segment of" in label for label in ours)


def _made(output: str) -> int:
    """Number of blocks that a run says it makes."""
    lines = [line for line in output.splitlines() if ": compress-" in line or ": quantize-" in line]
    return sum(int(line.split(": ")[-1].split()[0]) for line in lines if line.rstrip().endswith("steps ..."))


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@click.command(help=__doc__)
@click.option("--moments", default=30, show_default=True, help="Number of kills for each target.")
@click.option("--target", "targets", multiple=True, default=tuple(OPTIONS), show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(moments: int, targets: tuple[str, ...], seed: int) -> None:
    """Print a line for each kill."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    assert demo_checkpoint("llava") is not None
    for target in targets:
        chance = random.Random(f"{seed} {target}")
        with tempfile.TemporaryDirectory() as work:
            case = Case(target, Path(work))
            case.prepare()
            counts: Counter[str] = Counter()
            for number in range(moments):
                which, moment = SIGNALS[number % len(SIGNALS)], chance.uniform(0.3, 1) * case.seconds
                click.echo(
                    f"{target}: {which.name} after {moment:.1f} s of {case.seconds:.1f}: {case.kill(which, moment)}"
                )
                counts[which.name] += 1
        click.echo(f"{target}: {dict(counts)}: each run went on to the same bytes")


if __name__ == "__main__":
    main()
