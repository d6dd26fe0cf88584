"""Cross-layer equalization: protects outlier channels before weights are quantized, without calibration data.

In a gated MLP, down(act(gate(x)) * up(x)), a factor may move from a row of the up projection to the column of the down
projection that reads it. In the outlier channels of large models, the row of the up projection is large and the column of the
down projection is small. Each row of the down projection has one scale, which is too coarse for the small values of such a
column. Factors that make row and column equally large (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization
and Bias Correction", section 4.1) preserve these values. The factors are powers of two, so the model computes the same values
(except for float16 biases that become subnormal), and the codes of the up projection do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from passes.architecture import Architecture
from passes.ascend.values import to_float32, value_bits
from passes.checkpoint import Checkpoint

__all__ = ["Equalizer", "equalizers"]

_LARGEST = {"BF16": float.fromhex("0x1.fep+127"), "F16": 65504.0, "F32": np.finfo(np.float32).max}


@dataclass(frozen=True)
class Equalizer:
    """The factors of one MLP.

    Attributes:
        checkpoint: the float checkpoint.
        up: name of the up projection's matrix in the files.
        down: name of the down projection's matrix in the files.
        up_bias: name of the up projection's bias in the files, if it has one.
    """

    checkpoint: Checkpoint
    up: str
    down: str
    up_bias: str | None = None

    @cached_property
    def factors(self) -> np.ndarray:
        """Factors [channels], float32: they divide the up projection's rows, and multiply the down projection's columns."""
        rows = np.concatenate([np.abs(weights).max(axis=1) for weights in self._weights(self.up)])
        columns = reduce(np.maximum, (np.abs(weights).max(axis=0) for weights in self._weights(self.down)))
        factors = np.ones(len(rows), np.float32)
        usable = np.isfinite(rows) & np.isfinite(columns) & (rows > 0) & (columns > 0)
        if usable.any():
            exponents = (np.log2(rows[usable]) - np.log2(columns[usable])) / 2
            with np.errstate(over="ignore", under="ignore"):
                factors[usable] = np.exp2(np.rint(exponents - np.median(exponents)))
        # A channel whose weights or bias would become infinite gets no factor.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            fits = np.isfinite(rows / factors) & np.isfinite(columns * factors)
            if self.up_bias is not None:
                largest = _LARGEST[self.checkpoint.tensors[self.up_bias].dtype]
                fits &= np.abs(self.checkpoint.read(self.up_bias)) / factors <= largest
        factors[~fits] = 1
        return factors

    def of(self, name: str) -> dict[str, np.ndarray]:
        """The factors for the matrix `name`, which is `up` or `down`, as arguments of `CompressW8A16Pass.quantize`."""
        return {"outputs": self.factors} if name == self.up else {"inputs": self.factors}

    def bias(self, name: str) -> bytes:
        """The up projection's bias `name`, divided by the factors, as bytes in its own dtype."""
        dtype = self.checkpoint.tensors[name].dtype
        values = self.checkpoint.read(name) / self.factors
        if dtype == "BF16":
            # bfloat16 is the upper half of a float32; the lower half is zero, since a power of two changes no mantissa.
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()

    def _weights(self, name: str) -> Iterator[np.ndarray]:
        info = self.checkpoint.tensors[name]
        return (to_float32(bits, info.dtype) for bits in value_bits(self.checkpoint, info))


def equalizers(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, Equalizer]:
    """In-memory name of each tensor that equalization changes -> the equalizer of its MLP."""
    found: dict[str, Equalizer] = {}
    for up, down in architecture.gated:
        bias = [name for name in (f"{up}.bias",) if name in architecture.names]
        sources = [architecture.source(name) for name in (f"{up}.weight", f"{down}.weight", *bias)]
        equalizer = Equalizer(checkpoint, *sources)
        found |= dict.fromkeys((f"{up}.weight", f"{down}.weight", *bias), equalizer)
    return found
