"""OpenVINO IR: `.xml` with the graph, `.bin` with the weights, the key-value cache as the graph's state."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.model import Component as ComponentRecord
from manifests.model import FileRecord, Port
from passes.base import PassManager, named_failure
from passes.export.checksums import block_checksums
from passes.export.ir import count_weights, detach, write
from passes.export.openvino import BLOCK_FILE, ExportOpenvinoPass
from passes.export.stitch import block_names
from passes.export.template import BlockSource
from passes.split import Component
from passes.validate.cut import ArtifactBlocks
from passes.validate.graphs import verify_graph
from vlmconvert.artifact import link_or_copy
from vlmconvert.engines.openvino import OpenvinoEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from passes.chain import FloatChain
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

SUFFIXES = (".xml", ".bin")
artifact_blocks, open_engine, place_file = ArtifactBlocks, OpenvinoEngine, link_or_copy


def write_component(
    conversion: Conversion, plan: ComponentPlan, keys: list[str], chain: FloatChain | None, folder: Path
) -> list[FileRecord]:
    """Stitch a component, run its graph passes and write it.

    Args:
        conversion: with the checkpoint, its templates and the store.
        plan: of the component.
        keys: of its blocks in the store; blocks that are only exported are not there.
        chain: the float activations, if anything needs them.
        folder: an existing empty folder.

    Returns:
        Records of files that are hashed already.
    """
    component = plan.component
    model, weights = plan.stitch(component, _detached(conversion, plan, keys))
    model = PassManager(component.name, plan.graph_passes)(model)
    if component.state:
        _set_runtime_options(model, plan.precision)
    xml = folder / f"{component.stems['openvino']}.xml"
    if plan.quantize is None:
        return [write(model, weights, xml)]
    assert chain is not None
    with tempfile.TemporaryDirectory(prefix=".float-", dir=folder) as temporary:
        source = Path(temporary) / xml.name
        write(model, weights, source)
        samples = chain.component_inputs(component)[: conversion.options.vision_samples]
        with named_failure(plan.quantize, component.name, after=[item.name for item in plan.passes[:-1]]):
            conversion.helper.run(plan.quantize.run, source, samples, xml)
        conversion.helper.close()
    return []


def _detached(conversion: Conversion, plan: ComponentPlan, keys: list[str]) -> Iterator[Any]:
    """The blocks with their weights detached: from the store, or straight from the checkpoint if only exported."""
    for block, key in zip(plan.component.blocks, keys, strict=True):
        if isinstance(plan.block_pass, ExportOpenvinoPass):
            yield plan.block_pass(BlockSource(conversion.checkpoint, conversion.templates, block))
        else:
            yield detach(conversion.store.path(key) / BLOCK_FILE, block_names(block))


def _set_runtime_options(model: Any, precision: str) -> None:
    """What a plugin must know to compute the language model well.

    The cache stays as exact as the weights (the default on CPU is an 8-bit cache), and activations are scaled down where a
    GPU computes in half precision, whose range Llama 3.2 Vision leaves; both are the settings of OpenVINO's own example.
    With float32 weights the cache is left to the runtime: paged attention in bfloat16 refuses one of float32, which
    `EXECUTION_MODE_HINT` ACCURACY chooses by itself.
    """
    if precision != "fp32":
        model.set_rt_info("f16", ["runtime_options", "KV_CACHE_PRECISION"])
    model.set_rt_info("8.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])


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


def _port(port: Any, declared: Mapping[str, Port]) -> Port:
    """A graph's own port: dtype and static sizes from the graph, names of dynamic dims from the family."""
    name = next((name for name in port.get_names() if name in declared), port.get_any_name())
    dims = declared[name].shape if name in declared else [f"dim_{axis}" for axis in range(len(port.partial_shape))]
    shape = [
        size.get_length() if size.is_static else dim if isinstance(dim, str) else -1
        for size, dim in zip(port.partial_shape, dims, strict=True)
    ]
    return Port(name=name, dtype=port.element_type.get_type_name(), shape=shape)
