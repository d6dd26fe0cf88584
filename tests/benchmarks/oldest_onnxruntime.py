"""Run ONNX artifacts on the oldest ONNX Runtime that their manifests name, and on the release before it.

    python -m tests.benchmarks.oldest_onnxruntime ARTIFACT...

Each release is installed into an environment of its own, without this project. Every graph must give finite outputs on the
release that its component names; whether the one before it fails is printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

# What is tried below each release; none is older than 1.15 for this Python.
BEFORE = {"1.15": None, "1.17": "1.16", "1.22": "1.21"}
RUN = """
import sys
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
sizes = {"past_sequence": 0, "sequence": 3, "total_sequence": 3}
feeds = {
    port.name: np.ones([sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in port.shape], dtypes[port.type])
    for port in session.get_inputs()
}
assert all(np.isfinite(value).all() for value in session.run(None, feeds))
"""


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(artifacts: tuple[Path, ...]) -> None:
    """Try every component of the artifacts."""
    wanted: dict[str, list[tuple[Path, bool]]] = {}
    for artifact in artifacts:
        for component in json.loads((artifact / "manifest.json").read_text())["components"]:
            oldest = component["requires"]["onnxruntime"]
            graph = next(artifact / file["path"] for file in component["files"] if file["path"].endswith(".onnx"))
            wanted.setdefault(oldest, []).append((graph, True))
            if BEFORE[oldest]:
                wanted.setdefault(BEFORE[oldest], []).append((graph, False))
    failures = 0
    for release, graphs in sorted(wanted.items()):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python = str(Path(folder) / "bin" / "python")
            command = [python, "-m", "pip", "install", "--quiet", f"onnxruntime=={release}.*", "numpy<2"]
            subprocess.run(command, check=True)
            for graph, must_run in graphs:
                result = subprocess.run([python, "-c", RUN, str(graph)], capture_output=True, text=True)
                reason = "" if result.returncode == 0 else result.stderr.strip().splitlines()[-1][:120]
                click.echo(f"{release}  {graph.parent.name}/{graph.name}: {reason or 'runs'}")
                failures += must_run and result.returncode != 0
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
