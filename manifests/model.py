"""The manifest, version 1: a pydantic model, from which the committed JSON Schema is generated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from manifests.run_plan import RunPlan

__all__ = [
    "SCHEMA_VERSION",
    "Calibration",
    "Component",
    "FileRecord",
    "Manifest",
    "Port",
    "Requirements",
    "Sha256",
    "Source",
    "Validation",
]

SCHEMA_VERSION = "1.2"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Crc32 = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


def _stays_inside(path: str) -> str:
    if ".." in path.split("/"):
        raise ValueError("a path may not leave its folder")
    return path


RelativePath = Annotated[
    str, Field(pattern=r"^[^/]", description="path relative to its folder"), AfterValidator(_stays_inside)
]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One file: where it lies, its size in bytes and its SHA-256."""

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
    """One graph input or output. A shape entry is a size or the name of a dynamic dimension."""

    name: str
    dtype: str
    shape: list[int | str]


class Requirements(_Record):
    """What an ONNX graph asks of a runtime."""

    opset: int = Field(description="of ONNX's own operators")
    domains: dict[str, int] = Field(description="other operator domains and their versions")
    onnxruntime: str = Field(description="the oldest ONNX Runtime that runs it")


class Component(_Record):
    """One graph that is shipped, or all weights of a model whose graph the runtime has."""

    name: str
    role: str
    format: Literal["openvino", "onnx", "ascend-w8a16"]
    precision: str = Field(description="the precision that was asked for, such as int4-awq")
    files: list[FileRecord]
    inputs: list[Port]
    outputs: list[Port]
    state: list[str] = Field(description="names of the state variables that the graph keeps between calls")
    logits: Literal["last", "all"] | None = Field(description="which positions have logits; null if there are none")
    weights: dict[str, int] = Field(description="count of weight values of each dtype, read from the artifact")
    blocks: dict[str, Crc32] = Field(description="CRC-32 over the constants of each block, in the graph's order")
    passes: list[str] = Field(description="canonical lines of the passes, in the order they ran")
    fallbacks: list[str] = Field(description="layers that could not be compressed as asked, and what was done instead")
    requires: Requirements | None = Field(default=None, description="what an ONNX graph asks of a runtime")


class Calibration(_Record):
    """The samples that compression looked at."""

    source: str
    revision: str | None
    samples: int
    digest: Sha256 = Field(description="SHA-256 over the pixels and texts of the samples")
    seed: int


class Validation(_Record):
    """One figure that was measured on the finished artifact."""

    metric: str
    component: str = Field(description="component name, or artifact for the whole")
    reference: float | None = Field(description="the checkpoint's figure, where it has one of its own")
    value: float
    threshold: float | None = Field(description="limit for the value; null if the figure is only reported")
    passed: bool
    samples: int


class Manifest(_Record):
    """`manifest.json`: everything a runtime or an auditor needs to know about an artifact."""

    schema_version: str = SCHEMA_VERSION
    name: str
    family: str
    target: Literal["openvino", "onnx", "ascend"]
    source: Source
    components: list[Component]
    assets: list[FileRecord]
    calibration: Calibration | None
    validation: list[Validation]
    environment: dict[str, str]
    run_plan: RunPlan | None = Field(
        default=None, description="how an Ascend artifact is started, and the memory it takes"
    )
