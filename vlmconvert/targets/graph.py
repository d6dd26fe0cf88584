"""Targets whose artifacts are graphs: one graph for each component, stitched from its blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from manifests.errors import BadInputError
from manifests.files import read_json
from passes.base import final_bits
from vlmconvert.options import Option
from vlmconvert.targets.base import ComponentPlan, ComponentRequest, Target, source_size

if TYPE_CHECKING:
    from manifests.model import ComponentRecord, FileRecord, Manifest, OnnxRequirements, Port
    from manifests.verify import Finding
    from passes.chain import BlockModels
    from passes.vocabulary import Component
    from vlmconvert.families.base import Family
    from vlmconvert.families.opened import OpenedModel
    from vlmconvert.targets.runner import ArtifactRunner
    from vlmconvert.targets.runtime import Runtime

__all__ = ["LOGITS", "GraphTarget"]

LOGITS = Option(
    "logits",
    str,
    "Positions for which the language model returns logits.",
    default="last",
    choices=("last", "all"),
    in_passes=True,
)


class GraphTarget(Target):
    """Base class of the targets whose artifacts are graphs.

    Attributes:
        suffixes: endings of a component's two files: the file of the graph, and that of the weights.
    """

    precisions: ClassVar[Mapping[str, str]] = {"language": "int4-gptq", "vision": "int8-ptq"}
    options: ClassVar[tuple[Option, ...]] = (LOGITS,)
    traced: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, str]]

    def components(self, model: OpenedModel) -> tuple[Component, ...]:
        return model.components

    @abstractmethod
    def stem(self, component: Component) -> str:
        """Name of a component's files, without ending, under which runtimes and other tools look for it."""

    def graph_file(self, folder: Path, record: ComponentRecord) -> Path:
        """The file that has the graph of a component; another file has the weights.

        Raises:
            BadInputError: if the manifest lists no such file.
        """
        for file in record.files:
            if file.path.endswith(self.suffixes[0]):
                return folder / file.path
        raise BadInputError(f"the manifest of {folder} lists no graph of {record.name}: convert again")

    def plan(self, asked: ComponentRequest) -> ComponentPlan:
        fallbacks = []
        after = 0
        for block in asked.component.blocks:
            for name in block.tensors.values():
                info = asked.model.checkpoint.tensors[asked.model.names[name]]
                made = final_bits(asked.steps, block.role, name, info.shape, asked.layers.get(name))
                assert made is not None
                after += int(info.size * made.bits / 8)
                if made.fallback:
                    fallbacks.append(made.fallback)
        return ComponentPlan.of(asked, source_size(asked.model, asked.component), after, fallbacks)

    def record(
        self,
        plan: ComponentPlan,
        files: list[FileRecord],
        graph: Path,
        ports: tuple[list[Port], list[Port]],
        weights: dict[str, int],
        last: bool,
        state: Sequence[str] = (),
        requires: OnnxRequirements | None = None,
    ) -> ComponentRecord:
        """Make the manifest's record of a graph.

        Args:
            plan: plan of the component.
            files: records of the written files.
            graph: file of the graph.
            ports: inputs and outputs of the graph.
            weights: number of weight values of each dtype.
            last: whether the logits are those of the last position only.
            state: names of the state variables.
            requires: requirements of the graph on ONNX Runtime; None for other runtimes.
        """
        from manifests.model import ComponentRecord

        component = plan.component
        return ComponentRecord(
            name=component.name,
            role=component.role,
            format=self.name,
            precision=plan.precision,
            files=files,
            inputs=ports[0],
            outputs=ports[1],
            state=sorted(state),
            logits=None if not component.logits else "last" if last else "all",
            weights=weights,
            blocks=self.block_checksums(graph, component),
            passes=list(plan.lines),
            fallbacks=list(plan.fallbacks),
            requires=requires,
            layers=dict(plan.layers),
        )

    # Using an artifact.

    @abstractmethod
    def open_runtime(self, device: str, config: Mapping[str, Any], cache_dir: Path | None) -> Runtime:
        """Open the runtime that computes the graphs; see `Target.open_runner` for the arguments."""

    @abstractmethod
    def block_models(self, graphs: Mapping[str, Path]) -> BlockModels:
        """The blocks of finished graphs, which are given by the names of their components."""

    @abstractmethod
    def block_checksums(self, graph: Path, component: Component) -> dict[str, str]:
        """CRC-32 of the weights of each block, as eight hexadecimal digits."""

    @abstractmethod
    def verify_graph(self, record: ComponentRecord, graph: Path) -> Iterator[Finding]:
        """Compare the inputs, outputs, state and weights of a graph with its record in the manifest."""

    def open_runner(
        self,
        folder: Path,
        manifest: Manifest,
        family: Family,
        device: str,
        config: Mapping[str, Any],
        cache_dir: Path | None,
    ) -> ArtifactRunner:
        from vlmconvert.targets.runner import GraphRunner

        graphs = {record.name: self.graph_file(folder, record) for record in manifest.components}
        return GraphRunner(folder, manifest, family, graphs, self.open_runtime(device, config, cache_dir))

    def blocks(self, folder: Path, manifest: Manifest, family: Family) -> BlockModels | None:
        return self.block_models({record.name: self.graph_file(folder, record) for record in manifest.components})

    def verify(self, folder: Path, manifest: Manifest, family: Family, damaged: set[str]) -> Iterator[Finding]:
        from manifests.verify import failed, skipped

        components = _described(folder, family)
        for name in sorted(components.keys() - {record.name for record in manifest.components}):
            yield failed("blocks", name, "the manifest does not list this component, which config.json describes")
        for record in manifest.components:
            graph = self.graph_file(folder, record)
            broken = [
                file.path
                for file in record.files
                if f"{record.name}, {file.path}" in damaged or not (folder / file.path).is_file()
            ]
            if graph.name in broken or not all((folder / name).is_file() for name in broken):
                yield skipped("blocks", record.name, f"not checked, because {broken[0]} is damaged")
            elif record.name not in components:
                yield failed("blocks", record.name, "config.json does not describe this component")
            else:
                yield from self._verify_blocks(record, components[record.name], graph, damaged=bool(broken))
            if broken:
                yield skipped("graph", record.name, f"not checked, because {broken[0]} is damaged")
            else:
                yield from self.verify_graph(record, graph)

    def contradictions(self, manifest: Manifest) -> Iterator[str]:
        for component in manifest.components:
            suffixes = sorted(Path(file.path).suffix for file in component.files)
            wanted = sorted(Path(f"x{end}").suffix for end in self.suffixes)
            if component.format != self.name:
                yield f"the target is {self.name}, but the format of component {component.name} is {component.format}"
            elif suffixes != wanted:
                yield f"component {component.name} does not have one {self.suffixes[0]} file and one {self.suffixes[1]} file"
        if manifest.run_plan is not None:
            yield f"it has a run plan, but artifacts for {self.name} have none"

    def _verify_blocks(
        self, record: ComponentRecord, component: Component, graph: Path, damaged: bool
    ) -> Iterator[Finding]:
        """Compare the weights of each block with the manifest."""
        from manifests.verify import failed, passed

        try:
            checksums = self.block_checksums(graph, component)
        except Exception as error:  # a damaged graph may break its reader in any way
            yield failed("blocks", record.name, f"{graph.name} cannot be read: {error or type(error).__name__}")
            return
        names = [*record.blocks, *(checksums.keys() - record.blocks.keys())]
        findings = [
            failed("blocks", f"{record.name}, block {name}", "its weights are not those of the manifest")
            for name in names
            if checksums.get(name) != record.blocks.get(name)
        ]
        if damaged and not findings:
            findings = [failed("blocks", record.name, "the damaged bytes do not belong to a weight of any block")]
        yield from findings or [passed("blocks", record.name, str(len(checksums)))]


def _described(folder: Path, family: Family) -> dict[str, Component]:
    """The components that an artifact's config.json describes, by name; none if the file is damaged."""
    try:
        config = read_json(folder / "config.json")
        return {component.name: component for component in family.components(config)}
    except Exception:  # a config that describes no model may break its reader in any way
        return {}
