"""Reading an Ascend W8A16 artifact as if it were the float checkpoint that its codes and scales stand for.

Every tensor is dequantized when it is asked for, so what computes a checkpoint block by block computes an artifact block by
block: its logits are those of a runtime that multiplies dequantized weights, without an NPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo, read_config, read_header
from passes.export.ascend import DESCRIPTION_NAME, OFFSET, SCALE

if TYPE_CHECKING:
    import numpy as np

__all__ = ["W8A16Checkpoint", "open_w8a16", "read_description", "weight_files"]


@dataclass(frozen=True)
class W8A16Checkpoint(Checkpoint):
    """An opened artifact; `tensors` also has the scales and offsets, `names` leaves them out."""

    @property
    def names(self) -> list[str]:
        """The tensors that the float checkpoint has too."""
        return [name for name in self.tensors if not name.endswith((f".{SCALE}", f".{OFFSET}"))]

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32: (code - offset) * scale where it is quantized."""
        values = super().read(name)
        if self.tensors[name].dtype != "I8":
            return values
        prefix = name.removesuffix("weight")
        scales, offsets = super().read(f"{prefix}{SCALE}"), super().read(f"{prefix}{OFFSET}")
        grouped = values.reshape(*scales.shape, -1)
        grouped -= offsets[..., None]
        grouped *= scales[..., None]
        return values


def open_w8a16(folder: Path) -> W8A16Checkpoint:
    """Open an artifact; only metadata is read.

    Raises:
        BadInputError: if it is no W8A16 artifact, or a file is damaged.
    """
    config = read_config(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in read_header(folder, file, (*FLOAT_DTYPES, "I8")).items():
            if name in tensors:
                raise BadInputError(
                    f"{folder}: tensor {name} stands in both {tensors[name].file} and {file}: convert the checkpoint again"
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
            raise BadInputError(f"{folder} lacks scale or offset of tensor {name}: convert the checkpoint again")
    return W8A16Checkpoint(folder.resolve().name, None, folder, config, tensors)


def read_description(folder: Path) -> dict[str, Any]:
    """What `quant_model_description.json` says.

    Raises:
        BadInputError: if it is missing, damaged, or of another quantization.
    """
    path = folder / DESCRIPTION_NAME
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}): give a folder converted with --target ascend") from error
    if not isinstance(description, dict) or description.get("model_quant_type") != "W8A16":
        raise BadInputError(f"{path} does not describe W8A16 weights: give a folder converted with --llm w8a16")
    return description


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that MindIE opens: all that are not hidden."""
    return sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
