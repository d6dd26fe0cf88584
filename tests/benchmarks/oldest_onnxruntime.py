"""Run ONNX artifacts on the oldest ONNX Runtime that their manifests name, and on the release before it.

    python -m tests.benchmarks.oldest_onnxruntime ARTIFACT...

Each release is installed into a folder of its own, so packages must be reachable. Every graph must give finite outputs on
the release that its component names; whether the one before it fails is printed. `tests/vlmconvert/targets/onnx/test_target.py` does the
same with the demo.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click

from manifests.io import read_manifest
from tests.packages import install

__all__ = ["BEFORE", "graphs_by_release", "install_onnxruntime", "run_graph"]

# What is tried below each release; none is older than 1.15 for this Python.
BEFORE = {"1.15": None, "1.17": "1.16", "1.22": "1.21"}
RUN = """
import sys
import numpy as np
import onnxruntime as ort

assert ort.__version__.startswith(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
sizes = {"past_sequence": 0, "sequence": 3, "total_sequence": 3}
feeds = {
    port.name: np.ones([sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in port.shape], dtypes[port.type])
    for port in session.get_inputs()
}
assert all(np.isfinite(value).all() for value in session.run(None, feeds))
"""


def graphs_by_release(artifacts: Iterable[Path]) -> dict[str, list[Path]]:
    """Release -> the graphs whose component names it as the oldest one."""
    graphs: dict[str, list[Path]] = {}
    for artifact in artifacts:
        for component in read_manifest(artifact).components:
            assert component.requires is not None
            graph = next(artifact / file.path for file in component.files if file.path.endswith(".onnx"))
            graphs.setdefault(str(component.requires.onnxruntime), []).append(graph)
    return graphs


def install_onnxruntime(release: str, folder: Path) -> None:
    """Install a release of ONNX Runtime into a folder, with nothing but a numpy of its time, which is all that it imports.

    Raises:
        subprocess.CalledProcessError: see `install`.
    """
    install(folder, f"onnxruntime=={release}.*", "numpy<2")


def run_graph(graph: Path, release: str, folder: Path) -> str:
    """Run a graph on a release that is installed in a folder; returns the error, or nothing."""
    command = [sys.executable, "-c", RUN, str(graph.resolve()), release]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return "" if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(artifacts: tuple[Path, ...]) -> None:
    """Try every component of the artifacts."""
    failures = 0
    for oldest, graphs in graphs_by_release(artifacts).items():
        for release in filter(None, (oldest, BEFORE[oldest])):
            with tempfile.TemporaryDirectory() as folder:
                install_onnxruntime(release, Path(folder))
                for graph in graphs:
                    error = run_graph(graph, release, Path(folder))
                    click.echo(f"{release}  {graph.parent.name}/{graph.name}: {error[:120] or 'runs'}")
                    failures += release == oldest and error != ""
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
