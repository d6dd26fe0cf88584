"""Memory is that of a block: components are so deep here that a process that holds a whole one would be noticed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.random_llava import write_random_llava

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peaks of processes are read from /proc"),
]

LAYERS, HIDDEN = 30, 512
SHAPE = {"layers": LAYERS, "hidden": HIDDEN, "intermediate": 4 * HIDDEN, "heads": 8, "vocabulary": 1024}
# Bytes of the smaller component, the vision tower, in float32.
COMPONENT = 4 * LAYERS * 12 * HIDDEN**2


def look(pid: int) -> tuple[int, bool]:
    """Peak of the resident memory of a process so far, in bytes, and whether it has torch."""
    folder = Path(f"/proc/{pid}")
    try:
        line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, "libtorch" in (folder / "maps").read_text()
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0, False


def descendants(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(below for child in children for below in descendants(child))]


def peaks_of_processes(*command: str | Path) -> tuple[int, int]:
    """Run a command; returns the peak of its first process, and the largest of those that never have torch.

    The helper, which reads the architecture, has torch, and does not look at weights.
    """
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks: dict[int, int] = {}
    with_torch: set[int] = set()
    while process.poll() is None:
        for pid in descendants(process.pid):
            found, torch = look(pid)
            peaks[pid] = max(found, peaks.get(pid, 0))
            with_torch |= {pid} if torch else set()
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read().decode()
    return peaks[process.pid], max((found for pid, found in peaks.items() if pid not in with_torch), default=0)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "checkpoint"
    write_random_llava(folder, **SHAPE, vision_layers=LAYERS, vision_hidden=HIDDEN)
    return folder


@pytest.fixture(scope="module")
def idle():
    """A process with all that one needs to compress a block."""
    code = "import time\nfrom passes.compat.nncf import without_torch\nwith without_torch():\n    import nncf, openvino\n    time.sleep(0.5)"
    return peaks_of_processes("-c", code)[1]


def conversion(checkpoint: Path, folder: Path, *options: str | int) -> tuple[str | int | Path, ...]:
    places = ("--store", checkpoint.parent / "store", "-o", folder / "out")
    return ("-m", "vlmconvert", "llava", checkpoint, *options, *places, "--workers", 2, "--no-validate")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            (
                "--llm",
                "int4-awq",
                "--no-scale-estimation",
                "--samples",
                2,
                "--vision",
                "int8-ptq",
                "--vision-samples",
                2,
            ),
            marks=pytest.mark.exhaustive,
        ),
        ("--llm", "fp16", "--vision", "int8-ptq", "--vision-samples", 1),
        pytest.param(("--target", "onnx", "--llm", "int8", "--vision", "int8"), marks=pytest.mark.exhaustive),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_no_pass_holds_a_whole_component(options, deep, idle, tmp_path):
    _, found = peaks_of_processes(*conversion(deep, tmp_path, *options))
    assert idle > 50e6
    assert found - idle < 0.5 * COMPONENT


def test_the_process_that_writes_for_ascend_holds_no_component(deep, tmp_path):
    libraries = "import time, torch, click, rich, pydantic, safetensors.torch\ntime.sleep(0.5)"
    idle, _ = peaks_of_processes("-c", libraries)
    found, _ = peaks_of_processes(*conversion(deep, tmp_path, "--target", "ascend", "--llm", "w8a16"))
    assert idle > 100e6
    assert found - idle < 0.5 * COMPONENT
