"""The files of an artifact, and what a manifest says of its components."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from manifests.model import Component as ComponentRecord
from manifests.model import FileRecord, Manifest, Port
from passes.export.checksums import block_checksums
from passes.export.ir import count_weights
from passes.split import Component
from passes.store import digest
from vlmconvert.plan import ComponentPlan

__all__ = ["describe_component", "link_or_copy", "manifest_digest", "processor_files"]


def processor_files(folder: Path) -> list[Path]:
    """Processor, tokenizer, chat template and generation config files of a checkpoint."""
    names = {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    }
    return [path for path in sorted(folder.iterdir()) if path.name in names]


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of a manifest without its figures, which do not change what the artifact answers."""
    return digest(manifest.model_copy(update={"validation": []}).model_dump(mode="json"))


def link_or_copy(source: Path, target: Path) -> None:
    """Let a finished, read-only file stand in a second place, without its bytes if the file system can."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def describe_component(plan: ComponentPlan, files: list[FileRecord], folder: Path) -> ComponentRecord:
    """The manifest's record of a component, its ports, state and weights read from the graph in `folder`."""
    import openvino as ov

    component: Component = plan.component
    xml = folder / f"{component.stems['openvino']}.xml"
    model = ov.Core().read_model(xml)
    declared = {port.name: port for port in (*component.inputs, *component.outputs)}
    state = [node.get_variable_id() for node in model.get_ordered_ops() if node.get_type_name() == "ReadValue"]
    last = component.logits and model.output("logits").partial_shape[1].is_static
    return ComponentRecord(
        name=component.name,
        role=component.role,
        format="openvino",
        precision=plan.precision,
        files=files,
        inputs=[_port(port, declared) for port in model.inputs],
        outputs=[_port(port, declared) for port in model.outputs],
        state=sorted(state),
        logits=None if not component.logits else "last" if last else "all",
        weights=count_weights(xml),
        blocks=block_checksums(xml, component),
        passes=[str(step) for step in plan.passes],
        fallbacks=list(plan.fallbacks),
    )


def _port(port: Any, declared: dict[str, Port]) -> Port:
    """A graph's own port: dtype and static sizes from the graph, names of dynamic dims from the family."""
    name = next((name for name in port.get_names() if name in declared), port.get_any_name())
    dims = declared[name].shape if name in declared else [f"dim_{axis}" for axis in range(len(port.partial_shape))]
    shape = [
        size.get_length() if size.is_static else dim if isinstance(dim, str) else -1
        for size, dim in zip(port.partial_shape, dims, strict=True)
    ]
    return Port(name=name, dtype=port.element_type.get_type_name(), shape=shape)
