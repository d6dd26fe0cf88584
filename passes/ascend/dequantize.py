"""Reading an Ascend W8A16 artifact as if it were a float checkpoint, by dequantizing its weights.

Every tensor is dequantized when it is read, so code that computes a checkpoint block by block also computes an artifact. The
logits are those of a runtime that multiplies dequantized weights, and no NPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from manifests.errors import BadInputError
from manifests.files import read_json
from passes.ascend.format import DESCRIPTION_NAME
from passes.ascend.w8a16 import OFFSET, SCALE
from passes.checkpoint import Checkpoint, read_config
from passes.header import FLOAT_DTYPES, TensorInfo, read_header

if TYPE_CHECKING:
    import numpy as np

__all__ = ["W8A16Checkpoint", "open_w8a16", "read_description", "weight_files"]


@dataclass(frozen=True)
class W8A16Checkpoint(Checkpoint):
    """An opened W8A16 artifact; `tensors` contains the scales and offsets too, `names` does not."""

    dtypes: ClassVar[tuple[str, ...]] = (*FLOAT_DTYPES, "I8")

    @property
    def names(self) -> list[str]:
        """Names of the tensors that the float checkpoint has too: all but scales and offsets."""
        return [name for name in self.tensors if not name.endswith((f".{SCALE}", f".{OFFSET}"))]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Read one tensor as float32: (code - offset) * scale if it is quantized."""
        values = super().read(name, rows)
        if self.tensors[name].dtype != "I8":
            return values
        prefix = name.removesuffix("weight")
        scales, offsets = (super(W8A16Checkpoint, self).read(f"{prefix}{part}", rows) for part in (SCALE, OFFSET))
        grouped = values.reshape(*scales.shape, -1)
        grouped -= offsets[..., None]
        grouped *= scales[..., None]
        return values


def open_w8a16(folder: Path) -> W8A16Checkpoint:
    """Open a W8A16 artifact; only metadata is read.

    Raises:
        BadInputError: if the folder is not a W8A16 artifact, or a file is damaged.
    """
    config = read_config(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in read_header(folder, file, W8A16Checkpoint.dtypes).items():
            if name in tensors:
                raise BadInputError(
                    f"{folder}: tensor {name} is in both {tensors[name].file} and {file}: convert the checkpoint again"
                )
            tensors[name] = info
    description = read_description(folder)
    for name, info in tensors.items():
        if name not in description:
            raise BadInputError(
                f"{folder / DESCRIPTION_NAME} does not describe tensor {name}: convert the checkpoint again"
            )
        prefix = name.removesuffix("weight")
        if info.dtype == "I8" and not {f"{prefix}{SCALE}", f"{prefix}{OFFSET}"} <= tensors.keys():
            raise BadInputError(f"{folder} lacks the scale or offset of tensor {name}: convert the checkpoint again")
    return W8A16Checkpoint(folder.resolve().name, None, folder, config, tensors)


def read_description(folder: Path) -> dict[str, Any]:
    """Read `quant_model_description.json`: the settings of the quantization, and tensor -> type.

    Raises:
        BadInputError: if the file is missing, damaged, or describes another quantization.
    """
    path = folder / DESCRIPTION_NAME
    description = read_json(path, "give a folder converted with --target ascend")
    if not isinstance(description, dict) or description.get("model_quant_type") != "W8A16":
        raise BadInputError(f"{path} does not describe W8A16 weights: give a folder converted with --llm w8a16")
    return description


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that MindIE opens: all that are not hidden."""
    return sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
