"""A target for people: a text with a line for each tensor that its passes have made."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.files import file_record, write_atomically
from manifests.model import ComponentRecord, FileRecord
from manifests.verify import Finding, failed, passed
from passes.base import Form, Intermediate
from passes.tensor_pass import MadeTensor, Tensors
from vlmconvert.targets.assets import asset_records, copy_assets
from vlmconvert.targets.base import ComponentPlan, Job
from vlmconvert.targets.tensor import TensorTarget

if TYPE_CHECKING:
    from manifests.model import Manifest
    from vlmconvert.families.base import Family

__all__ = ["TARGET", "TensorNamesTarget"]

_FILE = "tensors.txt"
_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


class TensorNamesTarget(TensorTarget):
    """A line is name, dtype, shape and CRC-32 of a tensor."""

    name = "tensor-names"
    title = "a list of tensors"
    summary = "people who count tensors"
    ends = (Form.TENSORS,)
    precisions = {"language": "ranks"}  # noqa: RUF012  read only, as the base says
    options = ()
    runnable = False

    def file_sizes(self, made: Tensors, options: Mapping[str, Any]) -> dict[str, int]:
        return {_FILE: sum(len(_line(tensor, 0).encode()) for group in made.made() for tensor in group)}

    def write_component(self, plan: ComponentPlan, made: Intermediate, folder: Path, job: Job) -> list[FileRecord]:
        assert isinstance(made, Tensors)
        lines = [_line(tensor, _checksum(tensor)) for group in made.made() for tensor in group]
        write_atomically(folder / _FILE, "".join(lines))
        return [file_record(folder / _FILE, folder)]

    def describe(self, plan: ComponentPlan, files: list[FileRecord], folder: Path) -> ComponentRecord:
        return self.record(plan, files, folder, self.name).model_copy(update={"weights": _count(folder / _FILE)})

    def write_assets(self, job: Job, folder: Path) -> list[FileRecord]:
        copy_assets(job.model, folder)
        return asset_records(folder)

    def verify(self, folder: Path, manifest: Manifest, family: Family, damaged: set[str]) -> Iterator[Finding]:
        for component in manifest.components:
            try:
                counted = _count(folder / _FILE)
            except (OSError, ValueError, KeyError):
                counted = {}
            if counted == component.weights:
                yield passed("tensors", component.name, ", ".join(f"{count} {name}" for name, count in counted.items()))
            else:
                yield failed("tensors", component.name, f"{_FILE} does not list the weights of the manifest")


def _line(tensor: MadeTensor, checksum: int) -> str:
    entry = tensor.entry
    return f"{entry.name} {entry.dtype} {'x'.join(map(str, entry.shape))} {checksum:08x}\n"


def _checksum(tensor: MadeTensor) -> int:
    checksum = 0
    for chunk in tensor.chunks():
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _count(file: Path) -> dict[str, int]:
    """Count of weight values by dtype."""
    counts: dict[str, int] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        _, dtype, shape, _ = line.split(" ")
        values = 1
        for length in shape.split("x"):
            values *= int(length)
        counts[_DTYPES[dtype]] = counts.get(_DTYPES[dtype], 0) + values
    return dict(sorted(counts.items()))


TARGET = TensorNamesTarget()
