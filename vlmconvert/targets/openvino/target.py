"""OpenVINO IR: a `.xml` file has the graph, a `.bin` file the weights; the key-value cache is the graph's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.base import Form, Intermediate, TransformPass
from vlmconvert.targets.assets import asset_records, copy_assets
from vlmconvert.targets.base import ComponentPlan, ComponentRequest, Job
from vlmconvert.targets.graph import GraphTarget

if TYPE_CHECKING:
    from manifests.model import ComponentRecord, FileRecord, Port
    from manifests.verify import Finding
    from passes.chain import BlockModels
    from passes.vocabulary import Component
    from vlmconvert.targets.runtime import Runtime

__all__ = ["TARGET", "OpenvinoTarget", "graph_steps"]


class OpenvinoTarget(GraphTarget):
    """OpenVINO IR."""

    name = "openvino"
    title = "OpenVINO IR"
    links = True
    summary = "OpenVINO, OpenVINO GenAI and optimum-intel"
    ends = (Form.GRAPH,)
    distributions = ("openvino-tokenizers",)
    suffixes = (".xml", ".bin")

    def stem(self, component: Component) -> str:
        # optimum-intel writes and OpenVINO GenAI reads these names; those of mllama are from OpenVINO's own example.
        whole = component.name.endswith(("_model", "_encoder"))
        return f"openvino_{component.name}" if whole else f"openvino_{component.name}_model"

    def steps(
        self, component: Component, dtype: str, compression: Sequence[TransformPass], options: Mapping[str, Any]
    ) -> tuple[TransformPass, ...]:
        return graph_steps(component, dtype, compression, options)

    def plan(self, asked: ComponentRequest) -> ComponentPlan:
        from passes.export.make_stateful import MakeStatefulPass

        component = asked.component
        if component.state and not any(isinstance(step, MakeStatefulPass) for step in asked.steps):
            raise BadInputError(
                f"component {component.name}: the key-value cache must become the graph's state: add pass {MakeStatefulPass.name} "
                "after stitch"
            )
        return super().plan(asked)

    def write_component(self, plan: ComponentPlan, made: Intermediate, folder: Path, job: Job) -> list[FileRecord]:
        from passes.graph_pass import Graph

        assert isinstance(made, Graph)
        return made.save(folder / f"{self.stem(plan.component)}.xml")

    def describe(self, plan: ComponentPlan, files: list[FileRecord], folder: Path) -> ComponentRecord:
        import openvino as ov

        from passes.export.ir import count_weights

        component = plan.component
        xml = folder / f"{self.stem(component)}.xml"
        model = ov.Core().read_model(xml)
        declared = {port.name: port for port in (*component.inputs, *component.outputs)}
        inputs, outputs = ([_port(port, declared) for port in ports] for ports in (model.inputs, model.outputs))
        state = [node.get_variable_id() for node in model.get_ordered_ops() if node.get_type_name() == "ReadValue"]
        last = component.logits and model.output("logits").partial_shape[1].is_static
        return self.record(plan, files, xml, (inputs, outputs), count_weights(xml), last, state)

    def write_assets(self, job: Job, folder: Path) -> list[FileRecord]:
        from vlmconvert.targets.openvino.genai import GENAI_FILES, write_genai_files

        copy_assets(job.model, folder)
        if job.model.family.tokenizer_graphs:
            job.in_helper(write_genai_files, folder, job.model.family)
        return asset_records(folder, GENAI_FILES)

    def open_runtime(self, device: str, config: Mapping[str, Any], cache_dir: Path | None) -> Runtime:
        from vlmconvert.targets.openvino.runtime import OpenvinoRuntime

        return OpenvinoRuntime(device, config, cache_dir)

    def block_models(self, graphs: Mapping[str, Path]) -> BlockModels:
        from passes.validate.cut import ArtifactBlocks

        return ArtifactBlocks(graphs)

    def block_checksums(self, graph: Path, component: Component) -> dict[str, str]:
        from passes.export.checksums import block_checksums

        return block_checksums(graph, component)

    def verify_graph(self, record: ComponentRecord, graph: Path) -> Iterator[Finding]:
        from passes.validate.graphs import verify_graph

        return verify_graph(record, graph)


def graph_steps(
    component: Component, dtype: str, compression: Sequence[TransformPass], options: Mapping[str, Any]
) -> tuple[TransformPass, ...]:
    """The passes that make an OpenVINO graph; a precision's block passes run before stitching, its graph passes after."""
    from passes.export.make_stateful import MakeStatefulPass
    from passes.export.openvino import ExportOpenvinoPass
    from passes.export.slice_lm_head import SliceLmHeadPass
    from passes.export.stitch import StitchPass
    from passes.split import SplitPass

    on_blocks = [item for item in compression if Form.F32_BLOCKS in item.takes]
    on_graph = [item for item in compression if item not in on_blocks]
    structure: list[TransformPass] = [StitchPass()]
    if component.state:
        structure.append(MakeStatefulPass())
    if component.logits and options["logits"] == "last":
        structure.append(SliceLmHeadPass())
    return (SplitPass(), ExportOpenvinoPass(dtype), *on_blocks, *structure, *on_graph)


def _port(port: Any, declared: Mapping[str, Port]) -> Port:
    """Describe a port of a graph: dtype and static sizes are the graph's, names of dynamic dimensions the family's."""
    from manifests.model import Port

    name = next((name for name in port.get_names() if name in declared), port.get_any_name())
    dims = declared[name].shape if name in declared else [f"dim_{axis}" for axis in range(len(port.partial_shape))]
    shape = [
        size.get_length() if size.is_static else dim if isinstance(dim, str) else -1
        for size, dim in zip(port.partial_shape, dims, strict=True)
    ]
    return Port(name=name, dtype=port.element_type.get_type_name(), shape=shape)


TARGET = OpenvinoTarget()
