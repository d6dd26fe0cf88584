"""*compress-w8a16*: 8-bit weights for Ascend NPUs, symmetric, per output channel or per group of input channels.

The weights of a matrix are read in runs of rows that fit into a core's cache, so memory use does not depend on the model's
size. All values are computed in float32, whatever the checkpoint's dtype. The result equals that of msmodelslim 26.1 on a
float32 model: scale = max(absmax / 127, 2^-23), code = round(weight / scale), halves to even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from manifests.errors import BadInputError
from passes.ascend.equalize import Equalizer, equalizers
from passes.ascend.values import INFINITY, MAGNITUDE, check_finite, nonfinite, to_float32, value_bits
from passes.base import WeightBits
from passes.checkpoint import Checkpoint
from passes.export.safetensors import CHUNK, Entry, raw_chunks, ring
from passes.header import TensorInfo
from passes.tensor_pass import Chunks, MadeTensor, StoredTensor, TensorPass, Tensors

__all__ = [
    "OFFSET",
    "SCALE",
    "W8A16",
    "CompressW8A16Pass",
    "QuantizedTensor",
]

# Kind of quantized tensors, and the endings that replace `weight` in the names of scales and offsets.
W8A16 = "W8A16"
SCALE, OFFSET = "weight_scale", "weight_offset"

LEVELS = 127
# Minimum of a scale, so that nothing is divided by zero in a row of zeros; float16 can hold this value too.
SMALLEST_SCALE = np.finfo(np.float32).eps


@dataclass(frozen=True)
class CompressW8A16Pass(TensorPass):
    """8-bit weights with float32 scales for the linear layers of a language model.

    Embeddings, LM head, vision tower and projector stay float, as the runtimes expect. A tied LM head is written as a tensor
    of its own, because MindIE, vllm-ascend and msmodelslim's own reader look for it.

    Attributes:
        group_size: number of input channels that share a scale; 0, or -1 as for other passes, for one scale per row.
        allow_nonfinite: replace NaN by 0 and infinity by the largest finite weight of its group, instead of refusing the
            checkpoint.
        outlier_suppression: `none`, or `equalize` (see `passes.ascend.equalize`).
    """

    name = "compress-w8a16"

    group_size: int = 0
    allow_nonfinite: bool = False
    outlier_suppression: str = "none"

    def __post_init__(self) -> None:
        if self.group_size < -1:
            raise BadInputError(
                f"group size {self.group_size} is not possible: use a divisor of the input channels, or -1"
            )
        object.__setattr__(self, "group_size", max(self.group_size, 0))
        if self.outlier_suppression not in {"none", "equalize"}:
            raise BadInputError(f"outlier suppression {self.outlier_suppression} is unknown: use none or equalize")

    @property
    def takes_nonfinite(self) -> bool:
        return self.allow_nonfinite

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits | None:
        return WeightBits(8) if role == "layer" and len(shape) > 1 else None

    def converter(self, tensors: Tensors) -> Callable[[StoredTensor], Sequence[MadeTensor]]:
        checkpoint, architecture = tensors.checkpoint, tensors.architecture
        quantized = {f"{name}.weight" for name in architecture.linears}
        equalized = equalizers(checkpoint, architecture) if self.outlier_suppression == "equalize" else {}

        def convert(tensor: StoredTensor) -> list[MadeTensor]:
            equalizer = equalized.get(tensor.name)
            if tensor.name in quantized:
                return self._quantized(checkpoint, tensor, equalizer)
            return [self._float(checkpoint, tensor, equalizer)]

        return convert

    def _quantized(self, checkpoint: Checkpoint, tensor: StoredTensor, equalizer: Equalizer | None) -> list[MadeTensor]:
        """Scales, offsets and codes of a linear layer."""
        info = tensor.info
        shape = (info.shape[0], self.groups(checkpoint, tensor.source))
        # The scales come before the codes and depend on all weights, so the weights are read twice; the second time, the
        # file is in the system's cache.
        made: list[QuantizedTensor] = []

        def scales() -> Chunks:
            factors = equalizer.of(tensor.source) if equalizer else {}
            made.append(self.quantize(checkpoint, tensor.source, **factors))
            yield made[0].scales.reshape(-1).data.cast("B")

        def offsets() -> Chunks:
            yield bytes(size)

        def codes() -> Chunks:
            yield from made.pop().codes()

        prefix = tensor.on_hub.removesuffix("weight")
        size = 4 * shape[0] * shape[1]
        return [
            MadeTensor(Entry(f"{prefix}{SCALE}", "F32", shape, size), scales, W8A16),
            MadeTensor(Entry(f"{prefix}{OFFSET}", "F32", shape, size), offsets, W8A16),
            MadeTensor(Entry(tensor.on_hub, "I8", info.shape, info.size), codes, W8A16),
        ]

    def _float(self, checkpoint: Checkpoint, tensor: StoredTensor, equalizer: Equalizer | None) -> MadeTensor:
        """A tensor that stays float; only the bias of an equalized layer changes."""
        info = tensor.info

        def chunks() -> Chunks:
            for chunk in raw_chunks(checkpoint.folder, info, ring(CHUNK)):
                if not self.allow_nonfinite:
                    check_finite(checkpoint, tensor.source, chunk)
                if not equalizer:
                    yield chunk.data
            if equalizer:
                yield equalizer.bias(tensor.source)

        return MadeTensor(Entry(tensor.on_hub, info.dtype, info.shape, info.byte_size), chunks)

    def groups(self, checkpoint: Checkpoint, name: str) -> int:
        """Number of scales that each row of a matrix gets.

        Raises:
            BadInputError: if the tensor is not a matrix, or the group size does not divide its rows.
        """
        shape = checkpoint.tensors[name].shape
        if len(shape) != 2:
            raise BadInputError(
                f"{checkpoint.folder}: tensor {name} of shape {list(shape)} is not a matrix: correct the config"
            )
        if not self.group_size:
            return 1
        if shape[1] % self.group_size:
            raise BadInputError(
                f"--group-size {self.group_size} does not divide the {shape[1]} input channels of {name}: choose a divisor, or "
                "leave the option out for one scale per output channel"
            )
        return shape[1] // self.group_size

    def quantize(
        self,
        checkpoint: Checkpoint,
        name: str,
        inputs: np.ndarray | None = None,
        outputs: np.ndarray | None = None,
    ) -> QuantizedTensor:
        """Compute the scales of one matrix; `QuantizedTensor.codes` computes the codes.

        Args:
            checkpoint: the float checkpoint.
            name: name of the matrix in the files.
            inputs: [columns], powers of two that multiply the columns before quantization.
            outputs: [rows], powers of two that divide the rows; they change only the scales, not the codes.

        Raises:
            BadInputError: if a weight is NaN or infinite, unless `allow_nonfinite`.
        """
        groups = self.groups(checkpoint, name)
        info = checkpoint.tensors[name]
        scales = np.empty((info.shape[0], groups), np.float32)
        row, finite = 0, True
        for bits in value_bits(checkpoint, info):
            magnitude = np.bitwise_and(bits, bits.dtype.type(MAGNITUDE[info.dtype]))
            if magnitude.max() >= INFINITY[info.dtype]:
                if not self.allow_nonfinite:
                    raise nonfinite(checkpoint, name)
                finite = False
                magnitude[magnitude >= INFINITY[info.dtype]] = 0
            if inputs is None:
                # The largest bits belong to the largest value, and comparing bits is faster than converting all of them.
                absmax = to_float32(magnitude.reshape(len(bits), groups, -1).max(axis=2), info.dtype)
            else:
                absmax = (to_float32(magnitude, info.dtype) * inputs).reshape(len(bits), groups, -1).max(axis=2)
            np.divide(absmax, np.float32(LEVELS), out=scales[row : row + len(bits)])
            row += len(bits)
        np.maximum(scales, SMALLEST_SCALE, out=scales)
        return QuantizedTensor(checkpoint, info, scales, finite, inputs, outputs)


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized matrix: its scales, and codes that are computed on demand.

    Attributes:
        checkpoint: the float checkpoint.
        info: place of the float matrix.
        own_scales: [rows, groups], float32; the weights are divided by them.
        finite: whether all weights are finite.
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
        """Scales [rows, groups], float32, of the artifact: the codes are multiplied by them."""
        return self.own_scales if self.outputs is None else self.own_scales / self.outputs[:, None]

    def codes(self) -> Iterator[memoryview]:
        """The int8 codes as bytes, row by row, in views that stay valid as long as `manifests.files.write_hashed` requires."""
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
