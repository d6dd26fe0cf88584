"""The manifest, version 1: a pydantic model, from which the committed JSON Schema is generated."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from manifests.run_plan import RunPlan

__all__ = [
    "SCHEMA_VERSION",
    "Calibration",
    "CalibrationSettings",
    "ComponentRecord",
    "FileRecord",
    "Manifest",
    "OnnxRequirements",
    "Port",
    "Settings",
    "Sha256",
    "SizeBudget",
    "SizePoint",
    "Source",
    "Validation",
]

SCHEMA_VERSION = "1.3"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Crc32 = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


def _stays_inside(path: str) -> str:
    if ".." in re.split(r"[/\\]", path) or PureWindowsPath(path).drive or PureWindowsPath(path).root:
        raise ValueError("a path may not lead out of its folder")
    return path


RelativePath = Annotated[
    str, Field(pattern=r"^[^/]", description="path relative to its folder"), AfterValidator(_stays_inside)
]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One file: its path, its size in bytes and its SHA-256."""

    path: RelativePath
    size: int = Field(ge=0)
    sha256: Sha256


class Source(_Record):
    """The checkpoint that was converted."""

    model: str = Field(description="hub id, or the folder's name for a local checkpoint")
    revision: str | None = Field(description="hub commit, null for a local folder")
    architecture: str
    dtype: str = Field(description="dtype of the weights in the checkpoint")
    files: list[FileRecord]


class Port(_Record):
    """One input or output of a graph. Each entry of the shape is a size or the name of a dynamic dimension."""

    name: str
    dtype: str
    shape: list[int | str]


class OnnxRequirements(_Record):
    """What a runtime must support to run an ONNX graph."""

    opset: int = Field(description="version of ONNX's own operators")
    domains: dict[str, int] = Field(description="other operator domains and their versions")
    onnxruntime: str = Field(description="oldest version of ONNX Runtime that runs the graph")


class ComponentRecord(_Record):
    """One shipped graph; or all weights of a model, for a runtime that has the model's graph itself."""

    name: str
    role: str
    format: str = Field(description="format of the files: openvino, onnx, ascend-w8a16, or that of another target")
    precision: str = Field(description="the precision that was asked for, such as int4-awq")
    files: list[FileRecord]
    inputs: list[Port]
    outputs: list[Port]
    state: list[str] = Field(description="names of the state variables that the graph keeps between calls")
    logits: Literal["last", "all"] | None = Field(description="positions that have logits; null if the graph has none")
    weights: dict[str, int] = Field(description="number of weight values of each dtype, counted in the artifact")
    blocks: dict[str, Crc32] = Field(description="CRC-32 over the constants of each block, in the graph's order")
    passes: list[str] = Field(description="canonical lines of the passes, in the order they ran")
    fallbacks: list[str] = Field(description="layers that could not be compressed as asked, and what was done instead")
    layers: dict[str, str] = Field(
        default_factory=dict, description="tensor -> precision, for layers that do not have the component's precision"
    )
    requires: OnnxRequirements | None = Field(
        default=None, description="what a runtime must support to run an ONNX graph"
    )


class Calibration(_Record):
    """The calibration samples that compression used."""

    source: str
    revision: str | None
    samples: int
    digest: Sha256 = Field(description="SHA-256 over the pixels and texts of the samples")
    seed: int


class CalibrationSettings(_Record):
    """Which calibration samples compression uses."""

    source: str = Field(
        default="mixed", description="mixed, scenes, a folder, COCO or VQAv2 JSON, TSV, or a datasets id[:split]"
    )
    samples: int = Field(default=64, ge=0, description="number of prompts for passes over single blocks; 0 for none")
    vision_samples: int = Field(default=100, ge=1, description="number of samples for passes that quantize activations")
    sequence_length: int = Field(default=0, ge=0, description="maximum number of tokens of a sample; 0 for all")
    seed: int = Field(default=0, description="seed by which the samples are chosen")


class Settings(_Record):
    """The settings of a recipe beside its passes."""

    options: dict[str, bool | int | float | str] = Field(description="options of the target")
    calibration: CalibrationSettings | None = Field(description="null if no pass uses samples")


class SizePoint(_Record):
    """A size that an artifact could have, and what it would lose."""

    size: int = Field(description="bytes of all component files, about")
    kl: float = Field(description="KL divergence from the checkpoint in nats, as the measured losses of layers add up")


class SizeBudget(_Record):
    """How the formats of layers were chosen for a maximum size."""

    limit: int = Field(description="maximum number of bytes of all component files that was asked for")
    kl: float = Field(description="KL divergence from the checkpoint in nats that the choice is expected to have")
    curve: list[SizePoint] = Field(description="the best choices of other sizes")


class Validation(_Record):
    """One figure that was measured on the finished artifact."""

    metric: str
    component: str = Field(description="component name, or artifact for the whole")
    reference: float | None = Field(description="the checkpoint's value; null if the metric gives it none")
    value: float
    threshold: float | None = Field(description="limit for the value; null if the figure is only reported")
    passed: bool
    samples: int


class Manifest(_Record):
    """`manifest.json`: everything a runtime or an auditor needs to know about an artifact."""

    schema_version: str = SCHEMA_VERSION
    name: str
    family: str
    target: str = Field(description="runtime of the artifact: openvino, onnx, ascend, or one that a package adds")
    source: Source
    components: list[ComponentRecord]
    assets: list[FileRecord]
    calibration: Calibration | None
    validation: list[Validation]
    environment: dict[str, str]
    settings: Settings | None = Field(
        default=None, description="together with the components' passes, the recipe that makes the same artifact again"
    )
    size_budget: SizeBudget | None = Field(
        default=None, description="how the formats of layers were chosen; null if no maximum size was asked for"
    )
    run_plan: RunPlan | None = Field(
        default=None, description="how an Ascend artifact is started, and how much memory it takes"
    )
