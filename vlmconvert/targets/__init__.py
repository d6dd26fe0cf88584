"""The targets: one file each with everything that depends on what kind of graphs is made.

A target's module has:

- `SUFFIXES`, the endings of a component's two files, the graph's first;
- `write_component(conversion, plan, keys, chain, folder)`, which puts compressed blocks together;
- `describe_component(plan, files, folder)`, the manifest's record, read from the graph itself;
- `block_checksums(graph, component)`, a CRC-32 for each block's weights;
- `verify_graph(record, graph)`, what a graph really holds against its record;
- `artifact_blocks(graphs)`, the blocks of a finished artifact, to be computed one by one;
- `place_file(source, target)`, how a finished file gets from the store into an artifact;
- `open_engine(device, ov_config, cache_dir)`, the runtime that computes its graphs.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from manifests.errors import BadInputError
from manifests.model import Component

__all__ = ["TARGETS", "check_installed", "graph_file", "target_module"]

# Libraries that come with an extra of the same name.
_EXTRAS = {"onnx": ("onnx_ir", "onnxscript", "onnxruntime")}

TARGETS = {
    "openvino": "vlmconvert.targets.openvino",
    "onnx": "vlmconvert.targets.onnx",
}


def target_module(name: str) -> ModuleType:
    """The module of a target."""
    return importlib.import_module(TARGETS[name])


def check_installed(target: str) -> None:
    """Refuse a target whose libraries are not there.

    Raises:
        BadInputError: naming what installs them.
    """
    missing = [name for name in _EXTRAS.get(target, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInputError(f'--target {target} needs {", ".join(missing)}: pip install "vlmconvert[{target}]"')


def graph_file(record: Component) -> str:
    """The file of a component that holds its graph; the other one holds its weights."""
    suffix = target_module(record.format).SUFFIXES[0]
    return next(file.path for file in record.files if file.path.endswith(suffix))
