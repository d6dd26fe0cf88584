"""ONNX: `.onnx` with the graph, `.onnx.data` with the weights, the key-value cache as inputs and outputs.

What compression makes of a block does not depend on the target: its weights are taken from the block that the OpenVINO
passes have compressed, which the store keeps for both.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.model import Component as ComponentRecord
from manifests.model import FileRecord, Requirements
from passes.base import named_failure
from passes.export.openvino import BLOCK_FILE
from passes.export.template import BlockSource
from passes.onnx.checksums import block_checksums
from passes.onnx.compressed import CompressedGraph
from passes.onnx.cut import OnnxArtifactBlocks
from passes.onnx.export import ExportOnnxPass
from passes.onnx.file import count_weights, ports, requirements, write
from passes.onnx.graphs import verify_graph
from vlmconvert.engines.onnx import open_engine

if TYPE_CHECKING:
    from passes.chain import FloatChain
    from passes.onnx.graph import Detached
    from vlmconvert.pipeline import Conversion
    from vlmconvert.plan import ComponentPlan

__all__ = [
    "SUFFIXES",
    "artifact_blocks",
    "block_checksums",
    "describe_component",
    "open_engine",
    "place_file",
    "verify_graph",
    "write_component",
]

SUFFIXES = (".onnx", ".onnx.data")
# ONNX's own tools refuse weights that have a second name on the disk.
place_file = shutil.copyfile
artifact_blocks = OnnxArtifactBlocks


def write_component(
    conversion: Conversion, plan: ComponentPlan, keys: list[str], chain: FloatChain | None, folder: Path
) -> list[FileRecord]:
    """Stitch a component, slice its LM head and write it.

    Args:
        conversion: with the checkpoint, its traces and the store.
        plan: of the component.
        keys: of its blocks in the store; blocks that are only exported are not there.
        chain: the float activations, if anything needs them.
        folder: an existing empty folder.

    Returns:
        Records of files that are hashed already.
    """
    component = plan.component
    traces = conversion.onnx_traces
    if plan.openvino is not None:
        folder_of_weights = conversion.openvino_folders[component.name]
        compressed = CompressedGraph(folder_of_weights / f"{component.stems['openvino']}.xml")
        graphs = [compressed] * len(keys)
    elif plan.transfer is not None:
        graphs = [CompressedGraph(conversion.store.path(key) / BLOCK_FILE) for key in keys]

    def blocks() -> Iterator[Detached]:
        for index, block in enumerate(component.blocks):
            if plan.transfer is not None:
                with named_failure(plan.transfer, component.name, block.name):
                    yield plan.transfer(block, traces, graphs[index])
            else:
                assert isinstance(plan.block_pass, ExportOnnxPass)
                yield plan.block_pass(BlockSource(conversion.checkpoint, conversion.templates, block), traces)

    model, weights = plan.stitch(component, blocks())
    if plan.slice_lm_head is not None:
        with named_failure(plan.slice_lm_head, component.name, after=[plan.stitch.name]):
            model = plan.slice_lm_head(model)
    return [write(model, weights, folder / f"{component.stems['onnx']}.onnx")]


def describe_component(plan: ComponentPlan, files: list[FileRecord], folder: Path) -> ComponentRecord:
    """The manifest's record of a component, its ports, weights and needs read from the graph in `folder`."""
    component = plan.component
    path = folder / f"{component.stems['onnx']}.onnx"
    inputs, outputs = ports(path)
    needs = requirements(path)
    last = component.logits and next(port for port in outputs if port.name == "logits").shape[1] == 1
    return ComponentRecord(
        name=component.name,
        role=component.role,
        format="onnx",
        precision=plan.precision,
        files=files,
        inputs=inputs,
        outputs=outputs,
        state=[],
        logits=None if not component.logits else "last" if last else "all",
        weights=count_weights(path),
        blocks=block_checksums(path, component),
        passes=[str(step) for step in plan.passes],
        fallbacks=list(plan.fallbacks),
        requires=Requirements(opset=needs.opset, domains=needs.domains, onnxruntime=needs.onnxruntime),
    )
