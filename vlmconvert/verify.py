"""Verifying a finished artifact: files, manifest, blocks, graphs or its runtimes' rules, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from manifests.errors import VlmConvertError
from manifests.io import MANIFEST_NAME
from manifests.model import Component as ComponentRecord
from manifests.model import Manifest
from manifests.verify import Check, failed, passed, skipped, verify_files, verify_manifest
from passes.checkpoint import read_config
from passes.export.ascend import DESCRIPTION_NAME
from passes.split import Component
from passes.validate.ascend import check_folder
from vlmconvert.families import FAMILIES, family_module
from vlmconvert.targets import graph_file, target_module

__all__ = ["verify"]

_CONFIG = "config.json"


def verify(folder: Path, device: str = "CPU", run: bool = True) -> Iterator[Check]:
    """Yield every check of an artifact as it is done.

    Args:
        folder: the artifact.
        device: of the artifact's runtime.
        run: whether it is run at all, which takes the memory that using it takes; all else is read in small pieces.

    Raises:
        BadInputError: if the folder holds no manifest, and is no Ascend folder that another tool has written.
    """
    if not (folder / MANIFEST_NAME).is_file() and (folder / DESCRIPTION_NAME).is_file():
        yield skipped("file", ".", "no manifest to compare with")
        yield from _rules(folder, str(read_config(folder)["model_type"]).replace("_", "-"))
        return
    manifest, checks = verify_manifest(folder)
    yield from checks
    if manifest is None:
        yield skipped("file", ".", "no manifest to compare with")
        return
    damaged: set[str] = set()
    for check in verify_files(folder, manifest):
        if check.check == "file" and check.outcome == "failed":
            damaged.add(check.place)
        yield check
    if manifest.target == "ascend":
        yield from _rules(folder, manifest.family)
    else:
        yield from _graphs(folder, manifest, damaged)
    if not run:
        yield skipped("run", ".", "not asked for")
    elif damaged:
        yield skipped("run", ".", "not with damaged files")
    else:
        yield _run(folder, device)


def _rules(folder: Path, family: str) -> Iterator[Check]:
    """Hold an Ascend folder against the rules of its runtimes."""
    if family in FAMILIES:
        yield from check_folder(folder, family_module(family).ASCEND)
    else:
        yield failed("rules", ".", f"no rules are known for a {family} model")


def _graphs(folder: Path, manifest: Manifest, damaged: set[str]) -> Iterator[Check]:
    """Compare every graph and its blocks with the manifest."""
    components = _components(folder, manifest)
    for record in manifest.components:
        graph = folder / graph_file(record)
        target = target_module(record.format)
        broken = [file.path for file in record.files if f"{record.name}, {file.path}" in damaged]
        if graph.name in broken or not all((folder / file.path).is_file() for file in record.files):
            yield skipped("blocks", record.name, f"not with a damaged {broken[0]}")
        elif record.name not in components:
            yield skipped("blocks", record.name, f"{_CONFIG} does not describe this component")
        else:
            yield from _blocks(record, components[record.name], graph, damaged=bool(broken))
        if broken:
            yield skipped("graph", record.name, f"not with a damaged {broken[0]}")
        else:
            yield from target.verify_graph(record, graph)


def _components(folder: Path, manifest: Manifest) -> dict[str, Component]:
    """What the family makes of the config by name; nothing if the config is damaged beyond use."""
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
        components: tuple[Component, ...] = family_module(manifest.family).components(config)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {component.name: component for component in components}


def _blocks(record: ComponentRecord, component: Component, graph: Path, damaged: bool) -> Iterator[Check]:
    """Compare the constants of each block with the manifest."""
    try:
        checksums: dict[str, str] = target_module(record.format).block_checksums(graph, component)
    except (ElementTree.ParseError, KeyError, ValueError, VlmConvertError) as error:
        yield failed("blocks", record.name, f"{graph.name} cannot be read: {error}")
        return
    names = [*record.blocks, *(checksums.keys() - record.blocks.keys())]
    findings = [
        failed("blocks", f"{record.name}, block {name}", "its weights are not those of the manifest")
        for name in names
        if checksums.get(name) != record.blocks.get(name)
    ]
    if damaged and not findings:
        findings = [failed("blocks", record.name, "the damage lies between the weights, outside of every block")]
    yield from findings or [passed("blocks", record.name, str(len(checksums)))]


def _run(folder: Path, device: str) -> Check:
    """Open the artifact in its runtime and ask it about an image, which every component but those for videos takes part in."""
    import numpy as np
    from PIL import Image

    from calibration.inputs import load_processor, prompt_inputs
    from vlmconvert.runtime import open_runner

    try:
        runner = open_runner(folder, device)
        inputs = prompt_inputs(load_processor(folder), [Image.new("RGB", (64, 64), "grey")], ["What is it?"])
        logits = runner.prefill(inputs)
    except Exception as error:
        return failed("run", ".", " ".join(str(error).split()))
    if not np.isfinite(logits).all():
        return failed("run", ".", f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are not finite")
    return passed("run", ".", f"logits {list(logits.shape)} on {device}")
