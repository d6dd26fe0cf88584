"""A bill of materials of an artifact: a CycloneDX 1.6 ML-BOM, made from its manifest and its model card.

The library has no classes for CycloneDX's model card and data sets, so these two objects are added to its JSON.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from manifests.files import file_record, sha256_file
from manifests.io import MANIFEST_NAME, read_manifest
from manifests.model import Calibration, ComponentRecord, FileRecord, Manifest, Source
from vlmconvert.conversion.model_card import read_license
from vlmconvert.version import __version__

if TYPE_CHECKING:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

__all__ = ["bom"]

_MODEL, _SAMPLES = "model", "calibration-samples"  # references inside the BOM


def bom(folder: Path) -> str:
    """Describe an artifact as a CycloneDX 1.6 ML-BOM.

    Args:
        folder: the artifact.

    Returns:
        The BOM as JSON; equal artifacts have equal BOMs.

    Raises:
        BadInputError: if the folder is not an artifact, or `cyclonedx-python-lib` is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise BadInputError(f'a BOM needs {error.name}: pip install "vlmconvert[bom]"') from None
    manifest = read_manifest(folder)
    model = _model(manifest, file_record(folder / MANIFEST_NAME, folder), _licenses(folder))
    made = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, sha256_file(folder / MANIFEST_NAME)),
        metadata=BomMetaData(component=model, tools=_tools()),
        components=[_library(name, version) for name, version in manifest.environment.items()],
    )
    if manifest.calibration is not None:
        made.components.add(_samples(manifest.calibration))
    made.register_dependency(model, made.components)
    content = json.loads(JsonV1Dot6(made).output_as_string())
    del content["metadata"]["timestamp"]  # when a BOM was made says nothing about the artifact
    content["metadata"]["component"]["modelCard"] = _model_card(manifest)
    for component in content["components"]:
        if component["type"] == "data":
            component["data"] = [{"type": "dataset", "name": component["name"]}]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _model(manifest: Manifest, manifest_file: FileRecord, licenses: Sequence[License]) -> Component:
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    files = [_file(record) for record in (*manifest.assets, manifest_file)]
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=_MODEL,
        name=manifest.name,
        licenses=licenses,
        pedigree=Pedigree(ancestors=[_checkpoint(manifest.source)]),
        components=[*(_graph(component) for component in manifest.components), *files],
        properties=_properties({"family": manifest.family, "target": manifest.target}),
    )


def _checkpoint(source: Source) -> Component:
    """The checkpoint; only one of the hub can be named for others to find."""
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    owner, _, name = source.model.rpartition("/")
    on_hub = source.revision is not None
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="checkpoint",
        group=owner or None,
        name=name,
        version=source.revision,
        purl=PackageURL("huggingface", owner, name, source.revision) if on_hub else None,
        components=[_file(record, "checkpoint/") for record in source.files],
        properties=_properties({"architecture": source.architecture, "dtype": source.dtype}),
    )


def _graph(component: ComponentRecord) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    said = {"role": component.role, "format": component.format, "precision": component.precision}
    said |= {f"weights:{dtype}": str(count) for dtype, count in component.weights.items()}
    said |= {f"pass:{place}": line for place, line in enumerate(component.passes, 1)}
    said |= {f"layer:{name}": precision for name, precision in component.layers.items()}
    said |= {f"fallback:{place}": line for place, line in enumerate(component.fallbacks, 1)}
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"component:{component.name}",
        name=component.name,
        components=[_file(record) for record in component.files],
        properties=_properties(said),
    )


def _file(record: FileRecord, where: str = "") -> Component:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        type=ComponentType.FILE,
        bom_ref=f"file:{where}{record.path}",
        name=record.path,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=record.sha256)],
    )


def _library(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL("pypi", None, name, version)
    return Component(type=ComponentType.LIBRARY, bom_ref=str(purl), name=name, version=version, purl=purl)


def _samples(calibration: Calibration) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    said = {"samples": calibration.samples, "seed": calibration.seed, "sha256": calibration.digest}
    return Component(
        type=ComponentType.DATA,
        bom_ref=_SAMPLES,
        name=calibration.source,
        version=calibration.revision,
        properties=_properties({name: str(value) for name, value in said.items()}),
    )


def _tools() -> Any:
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository

    return ToolRepository(
        components=[Component(type=ComponentType.APPLICATION, name="vlmconvert", version=__version__)]
    )


def _properties(values: dict[str, str]) -> Iterator[Property]:
    from cyclonedx.model import Property

    for name, value in values.items():
        yield Property(name=f"vlmconvert:{name}", value=value)


def _licenses(folder: Path) -> list[License]:
    """The license that the artifact's model card names, if it names one."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    said = read_license(folder)
    name = said.get("license_name") or said.get("license")
    return [LicenseFactory().make_from_string(name)] if name else []


def _model_card(manifest: Manifest) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "task": "image-text-to-text",
        "architectureFamily": manifest.family,
        "modelArchitecture": manifest.source.architecture,
        "inputs": [{"format": "text"}, {"format": "image"}],
        "outputs": [{"format": "text"}],
    }
    if manifest.calibration is not None:
        parameters["datasets"] = [{"ref": _SAMPLES}]
    figures = [
        {"type": figure.metric, "value": f"{figure.value:g}", "slice": figure.component}
        for figure in manifest.validation
    ]
    limits = [
        {
            "name": f"vlmconvert:limit:{figure.metric}:{figure.component}",
            "value": f"{figure.threshold:g} ({'passed' if figure.passed else 'failed'})",
        }
        for figure in manifest.validation
        if figure.threshold is not None
    ]
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": figures},
        "properties": limits,
    }
