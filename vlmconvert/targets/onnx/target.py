"""ONNX: a `.onnx` file has the graph, a `.onnx.data` file the weights; the key-value cache is inputs and outputs.

Compressed weights do not depend on the target: they are taken from the blocks that the OpenVINO passes have compressed,
which the store keeps for both targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import Form, Intermediate, TransformPass
from vlmconvert.targets.assets import asset_records, copy_assets
from vlmconvert.targets.base import ComponentPlan, Job
from vlmconvert.targets.graph import GraphTarget

if TYPE_CHECKING:
    from manifests.model import ComponentRecord, FileRecord
    from manifests.verify import Finding
    from passes.chain import BlockModels
    from passes.vocabulary import Component
    from vlmconvert.targets.runtime import Runtime

__all__ = ["TARGET", "OnnxTarget"]

_STEMS = {"text_embeddings": "embed_tokens", "vision_embeddings": "vision_encoder"}


class OnnxTarget(GraphTarget):
    """ONNX, for ONNX Runtime."""

    name = "onnx"
    title = "ONNX"
    summary = "ONNX Runtime"
    ends = (Form.ONNX_GRAPH,)
    extra = "onnx"
    packages = ("onnx_ir", "onnxscript", "onnxruntime")
    distributions = ("onnx", "onnx-ir", "onnxscript")
    suffixes = (".onnx", ".onnx.data")

    def stem(self, component: Component) -> str:
        # transformers.js and optimum-onnx look for files of these names; their decoders take embeddings.
        if component.logits and any(port.name == "inputs_embeds" for port in component.inputs):
            return "decoder_model_merged"
        return _STEMS.get(component.name, component.name)

    def steps(
        self, component: Component, dtype: str, compression: Sequence[TransformPass], options: Mapping[str, Any]
    ) -> tuple[TransformPass, ...]:
        from passes.export.openvino import ExportOpenvinoPass
        from passes.onnx.export import ExportOnnxPass
        from passes.onnx.slice_lm_head import SliceLmHeadOnnxPass
        from passes.onnx.stitch import StitchOnnxPass
        from passes.onnx.transfer import TransferOnnxPass
        from passes.split import SplitPass

        blocks: list[TransformPass] = [ExportOnnxPass(dtype)]
        if compression:
            blocks = [ExportOpenvinoPass(dtype), *compression, TransferOnnxPass()]
        last = [SliceLmHeadOnnxPass()] if component.logits and options["logits"] == "last" else []
        return (SplitPass(), *blocks, StitchOnnxPass(), *last)

    def write_component(self, plan: ComponentPlan, made: Intermediate, folder: Path, job: Job) -> list[FileRecord]:
        from passes.onnx.file import write
        from passes.onnx.graph import OnnxGraph

        assert isinstance(made, OnnxGraph)
        model, weights = made.build()
        return [write(model, weights, folder / f"{self.stem(plan.component)}.onnx")]

    def describe(self, plan: ComponentPlan, files: list[FileRecord], folder: Path) -> ComponentRecord:
        from passes.onnx.file import count_weights, ports, requirements

        path = folder / f"{self.stem(plan.component)}.onnx"
        inputs, outputs = ports(path)
        last = plan.component.logits and next(port for port in outputs if port.name == "logits").shape[1] == 1
        weights, needs = count_weights(path), requirements(path)
        return self.record(plan, files, path, (inputs, outputs), weights, last, requires=needs)

    def write_assets(self, job: Job, folder: Path) -> list[FileRecord]:
        copy_assets(job.model, folder)
        return asset_records(folder)

    def open_runtime(self, device: str, config: Mapping[str, Any], cache_dir: Path | None) -> Runtime:
        from vlmconvert.targets.onnx.runtime import open_runtime

        self.check_installed()
        return open_runtime(device, config, cache_dir)

    def block_models(self, graphs: Mapping[str, Path]) -> BlockModels:
        from passes.onnx.cut import OnnxArtifactBlocks

        return OnnxArtifactBlocks(graphs)

    def block_checksums(self, graph: Path, component: Component) -> dict[str, str]:
        from passes.onnx.checksums import block_checksums

        return block_checksums(graph, component)

    def verify_graph(self, record: ComponentRecord, graph: Path) -> Iterator[Finding]:
        from passes.onnx.graphs import verify_graph

        return verify_graph(record, graph)


TARGET = OnnxTarget()
