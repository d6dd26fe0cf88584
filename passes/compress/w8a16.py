"""*compress-w8a16*: 8-bit weights for Ascend NPUs, symmetric, per output channel or per group of input channels.

The weights of a matrix are read in runs of rows that fit a core's cache, so memory does not depend on any size. Everything
is computed in float32 whatever the checkpoint is stored in; the arithmetic is that of msmodelslim 26.1 on a float32 model,
value for value: scale = max(absmax / 127, 2^-23), code = round(weight / scale), halves to even.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import repeat

import numpy as np

from manifests.errors import BadInputError
from passes.base import Pass
from passes.checkpoint import Checkpoint, TensorInfo
from passes.export.safetensors import CHUNK, raw_chunks, ring

__all__ = ["CompressW8A16Pass", "QuantizedTensor", "check_finite", "to_float32", "value_bits"]

LEVELS = 127
# The smallest scale, so that a row of zeros has one and nothing is divided by zero; float16 can hold it too.
SMALLEST_SCALE = np.finfo(np.float32).eps
_BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
# Infinity and NaN have all bits of the exponent set: on the bits without the sign, everything from here is one of them.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_MAGNITUDE = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}


@dataclass(frozen=True)
class CompressW8A16Pass(Pass):
    """Codes of 8 bit and float32 scales for the linear layers of a language model.

    Attributes:
        group_size: input channels that share a scale; 0 for one scale a row.
        allow_nonfinite: take weights that are NaN as 0 and infinite ones as the largest finite weight of their group,
            instead of refusing the checkpoint.
        outlier_suppression: `none`, or `equalize`, which see in `passes.compress.equalize`.
    """

    name = "compress-w8a16"

    group_size: int = 0
    allow_nonfinite: bool = False
    outlier_suppression: str = "none"

    def groups(self, checkpoint: Checkpoint, name: str) -> int:
        """Scales that each row of a matrix gets.

        Raises:
            BadInputError: if it is no matrix, or its rows do not divide into groups.
        """
        shape = checkpoint.tensors[name].shape
        if len(shape) != 2:
            raise BadInputError(
                f"{checkpoint.folder}: tensor {name} of shape {list(shape)} is no matrix: mend the config"
            )
        if not self.group_size:
            return 1
        if shape[1] % self.group_size:
            raise BadInputError(
                f"--group-size {self.group_size} does not divide the {shape[1]} input channels of {name}: choose a divisor, or "
                "leave the option out for one scale a channel"
            )
        return shape[1] // self.group_size

    def quantize(
        self,
        checkpoint: Checkpoint,
        name: str,
        inputs: np.ndarray | None = None,
        outputs: np.ndarray | None = None,
    ) -> QuantizedTensor:
        """Compute the scales of one matrix; its codes are computed while they are iterated over.

        Args:
            checkpoint: the float checkpoint.
            name: the matrix, by its name in the files.
            inputs: [columns], powers of two by which its columns are multiplied first.
            outputs: [rows], powers of two by which its rows are divided; that changes the scales alone.

        Raises:
            BadInputError: if a weight is NaN or infinite and that is not allowed.
        """
        groups = self.groups(checkpoint, name)
        info = checkpoint.tensors[name]
        scales = np.empty((info.shape[0], groups), np.float32)
        row, finite = 0, True
        for bits in value_bits(checkpoint, info):
            magnitude = np.bitwise_and(bits, bits.dtype.type(_MAGNITUDE[info.dtype]))
            if magnitude.max() >= _INFINITY[info.dtype]:
                if not self.allow_nonfinite:
                    raise _nonfinite(checkpoint, name)
                finite = False
                magnitude[magnitude >= _INFINITY[info.dtype]] = 0
            if inputs is None:
                # The largest bits are the largest value, and to compare them is faster than to convert them all.
                absmax = to_float32(magnitude.reshape(len(bits), groups, -1).max(axis=2), info.dtype)
            else:
                absmax = (to_float32(magnitude, info.dtype) * inputs).reshape(len(bits), groups, -1).max(axis=2)
            np.divide(absmax, np.float32(LEVELS), out=scales[row : row + len(bits)])
            row += len(bits)
        np.maximum(scales, SMALLEST_SCALE, out=scales)
        return QuantizedTensor(checkpoint, info, scales, finite, inputs, outputs)


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized matrix: its scales, and codes on demand.

    Attributes:
        own_scales: [rows, groups], float32; what the weights are divided by.
        finite: whether no weight is NaN or infinite.
        inputs: see `CompressW8A16Pass.quantize`.
        outputs: see `CompressW8A16Pass.quantize`.
    """

    checkpoint: Checkpoint
    info: TensorInfo
    own_scales: np.ndarray
    finite: bool
    inputs: np.ndarray | None = None
    outputs: np.ndarray | None = None

    @property
    def scales(self) -> np.ndarray:
        """[rows, groups], float32; what the codes are multiplied by."""
        return self.own_scales if self.outputs is None else self.own_scales / self.outputs[:, None]

    def codes(self) -> Iterator[memoryview]:
        """The codes row after row, as bytes of int8 in views that last as `manifests.files.write_hashed` asks."""
        columns = self.info.shape[1]
        groups = self.own_scales.shape[1]
        buffers = ring(max(CHUNK, columns))
        row = 0
        for bits in value_bits(self.checkpoint, self.info):
            scales = self.own_scales[row : row + len(bits), :, None]
            weights = to_float32(bits, self.info.dtype)
            if self.inputs is not None:
                weights *= self.inputs
            weights = weights.reshape(len(bits), groups, columns // groups)
            np.divide(weights, scales, out=weights)
            np.rint(weights, out=weights)
            if not self.finite:
                np.nan_to_num(weights, copy=False, nan=0, posinf=LEVELS, neginf=-LEVELS)
            codes = next(buffers)[: bits.size].view(np.int8).reshape(weights.shape)
            np.copyto(codes, weights, casting="unsafe")
            row += len(bits)
            yield codes.reshape(-1).data.cast("B")


def check_finite(checkpoint: Checkpoint, name: str, chunk: np.ndarray) -> None:
    """Look for NaN and infinity in some bytes of a tensor.

    Raises:
        BadInputError: if there is one, naming the tensor.
    """
    dtype = checkpoint.tensors[name].dtype
    bits = chunk.view(_BITS[dtype])
    if (bits & bits.dtype.type(_MAGNITUDE[dtype])).max(initial=0) >= _INFINITY[dtype]:
        raise _nonfinite(checkpoint, name)


def _nonfinite(checkpoint: Checkpoint, name: str) -> BadInputError:
    file = checkpoint.folder / checkpoint.tensors[name].file
    return BadInputError(
        f"{file}: tensor {name} holds NaN or infinity: give an intact checkpoint, or convert it all the same with "
        "--allow-nonfinite"
    )


def value_bits(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[np.ndarray]:
    """Runs of rows of a matrix, as the bits of its values: [rows, columns], unsigned, valid until the next run."""
    row_size = info.byte_size // info.shape[0]
    buffer = np.empty(max(CHUNK // row_size, 1) * row_size, np.uint8)
    for chunk in raw_chunks(checkpoint.folder, info, repeat(buffer)):
        yield chunk.view(_BITS[info.dtype]).reshape(-1, info.shape[1])


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values behind bits, as float32 in memory of their own."""
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype == "F16":
        return np.take(_float16_values(), bits)
    return bits.view(np.float32).copy()


@cache
def _float16_values() -> np.ndarray:
    """What each of the 65536 values of float16 is in float32; to look them up is faster than to convert in numpy."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
