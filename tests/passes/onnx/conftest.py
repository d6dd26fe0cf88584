"""The demo's kinds traced once, its components as ONNX files, and its blocks run in both runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import openvino as ov
import pytest

from passes.chain import compile_block
from passes.export.openvino import BLOCK_FILE
from passes.export.template import BlockSource
from passes.onnx.compressed import CompressedGraph
from passes.onnx.export import ExportOnnxPass
from passes.onnx.file import write
from passes.onnx.graph import MICROSOFT
from passes.onnx.session import OnnxSession
from passes.onnx.slice_lm_head import SliceLmHeadOnnxPass
from passes.onnx.stitch import StitchOnnxPass
from passes.onnx.trace import trace_kinds
from passes.onnx.transfer import TransferOnnxPass
from passes.vocabulary import Component, Kind
from tests.models import opened_model
from tests.traces import keep_traces
from vlmconvert.families.opened import OpenedModel


@dataclass
class Demo:
    """The demo checkpoint, split and traced."""

    model: OpenedModel
    traces: Path

    @property
    def components(self) -> dict[str, Component]:
        return {component.name: component for component in self.model.components}

    def source(self, block) -> BlockSource:
        return BlockSource(self.model.checkpoint, self.model.templates, block)

    def kinds(self):
        """One block of each kind."""
        found = {}
        for component in self.model.components:
            for block in component.blocks:
                found.setdefault(block.kind, (component.kinds[block.kind], block))
        return found

    def export(self, component: str, dtype: str, folder: Path, logits: str = "all") -> Path:
        """A float component as an ONNX file."""
        part = self.components[component]
        item = ExportOnnxPass(dtype)
        blocks = (item.export(self.source(block), self.traces) for block in part.blocks)
        return self._finish(part, blocks, folder, logits)

    def compress(self, component: str, block_pass, folder: Path) -> Path:
        """A component compressed block by block, without activations."""
        part = self.components[component]

        def blocks():
            for block in part.blocks:
                output = folder / block.name
                output.mkdir()
                block_pass.run(self.source(block), output)
                yield TransferOnnxPass().transfer(block, self.traces, CompressedGraph(output / BLOCK_FILE))

        return self._finish(part, blocks(), folder, "last")

    def _finish(self, part, blocks, folder, logits):
        model, weights = StitchOnnxPass().join(part, blocks)
        if part.logits and logits == "last":
            model = SliceLmHeadOnnxPass().slice(model, part)
        write(model, weights, folder / f"{part.name}.onnx")
        return folder / f"{part.name}.onnx"


@pytest.fixture(scope="session")
def traced(demo, store, shared_traces, tmp_path_factory) -> Demo:
    model = opened_model(demo, store)
    traces = tmp_path_factory.mktemp("traces")
    keep_traces(shared_traces, trace_kinds, model.config, model.components, traces)
    return Demo(model, traces)


@pytest.fixture(scope="session")
def floats(traced, tmp_path_factory):
    """Both components with float weights, once for each set of options."""
    built = {}

    def export(dtype: str, logits: str = "all") -> dict[str, Path]:
        if (dtype, logits) not in built:
            folder = tmp_path_factory.mktemp("onnx")
            built[dtype, logits] = {name: traced.export(name, dtype, folder, logits) for name in traced.components}
        return built[dtype, logits]

    return export


def inputs_of(kind: Kind, seed: int = 0) -> dict[str, np.ndarray]:
    """Values for a kind's inputs: floats around 0, integers 0 or 1."""
    random = np.random.default_rng(seed)
    values = {}
    for port in kind.inputs:
        shape = [kind.dims[size] if isinstance(size, str) else size for size in port.shape]
        values[port.name] = (
            random.standard_normal(shape).astype(np.float32) if port.dtype == "f32" else random.integers(0, 2, shape)
        )
    return values


def both_runtimes(block, kind, traces: Path, folder: Path, values, level: int = 0):
    """What a compressed block gives in OpenVINO and in ONNX Runtime."""
    expected = list(compile_block(ov.Core().read_model(folder / BLOCK_FILE))(values).values())
    model, weights = TransferOnnxPass(level).transfer(block, traces, CompressedGraph(folder / BLOCK_FILE))
    model.graph.opset_imports[MICROSOFT] = 1
    for value, port in zip(model.graph.outputs, kind.outputs, strict=True):
        value.shape = ir.Shape(port.shape)
    write(model, weights, folder / "block.onnx")
    engine = OnnxSession(folder / "block.onnx")
    return expected, [value.numpy() for value in engine.infer(values).values()], model


def greatest_difference(expected, actual) -> float:
    """Relative to the greatest value."""
    return max(
        float(np.abs(one - other).max() / np.abs(one).max()) for one, other in zip(expected, actual, strict=True)
    )
