"""Protection of outlier channels without data, before weights are quantized: cross-layer equalization.

In a gated MLP, down(act(gate(x)) * up(x)), a factor may move from a row of the up projection to the column of the down
projection that reads it. Where large models have outlier channels, the up projection's row is large and the down projection's
column small, so the column is lost among its neighbours when the row that it stands in gets one scale. Factors that make both
equally large (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1) keep
it. They are powers of two: the model computes the same values (but for float16 biases that become too small for all their
bits), and the up projection keeps its codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from passes.architecture import Architecture
from passes.checkpoint import Checkpoint
from passes.compress.w8a16 import to_float32, value_bits

__all__ = ["Equalizer", "equalizers"]

_LARGEST = {"BF16": float.fromhex("0x1.fep+127"), "F16": 65504.0, "F32": np.finfo(np.float32).max}


@dataclass(frozen=True)
class Equalizer:
    """The factors of one MLP.

    Attributes:
        up: the up projection's matrix, by its name in the files.
        down: the down projection's.
        up_bias: the up projection's bias, if it has one.
    """

    checkpoint: Checkpoint
    up: str
    down: str
    up_bias: str | None = None

    @cached_property
    def factors(self) -> np.ndarray:
        """[channels], float32: what the up projection's rows are divided by, and the down projection's columns multiplied by."""
        rows = np.concatenate([np.abs(weights).max(axis=1) for weights in self._weights(self.up)])
        columns = reduce(np.maximum, (np.abs(weights).max(axis=0) for weights in self._weights(self.down)))
        factors = np.ones(len(rows), np.float32)
        usable = np.isfinite(rows) & np.isfinite(columns) & (rows > 0) & (columns > 0)
        if usable.any():
            exponents = (np.log2(rows[usable]) - np.log2(columns[usable])) / 2
            with np.errstate(over="ignore", under="ignore"):
                factors[usable] = np.exp2(np.rint(exponents - np.median(exponents)))
        # A channel whose weights or bias would become infinite stays as it is.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            fits = np.isfinite(rows / factors) & np.isfinite(columns * factors)
            if self.up_bias is not None:
                largest = _LARGEST[self.checkpoint.tensors[self.up_bias].dtype]
                fits &= np.abs(self.checkpoint.read(self.up_bias)) / factors <= largest
        factors[~fits] = 1
        return factors

    def of(self, name: str) -> dict[str, np.ndarray]:
        """The factors of one of both matrices, as arguments of `CompressW8A16Pass.quantize`."""
        return {"outputs": self.factors} if name == self.up else {"inputs": self.factors}

    def bias(self, name: str) -> bytes:
        """The up projection's bias with its factors, in the dtype that it has."""
        dtype = self.checkpoint.tensors[name].dtype
        values = self.checkpoint.read(name) / self.factors
        if dtype == "BF16":
            # The upper half of a float32; the lower is empty, since a power of two leaves the mantissa as it is.
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()

    def _weights(self, name: str) -> Iterator[np.ndarray]:
        info = self.checkpoint.tensors[name]
        return (to_float32(bits, info.dtype) for bits in value_bits(self.checkpoint, info))


def equalizers(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, Equalizer]:
    """In-memory name of each tensor that changes -> the equalizer of its MLP."""
    found: dict[str, Equalizer] = {}
    for up, down in architecture.gated:
        bias = [name for name in (f"{up}.bias",) if name in architecture.names]
        sources = [architecture.source(name) for name in (f"{up}.weight", f"{down}.weight", *bias)]
        equalizer = Equalizer(checkpoint, *sources)
        found |= dict.fromkeys((f"{up}.weight", f"{down}.weight", *bias), equalizer)
    return found
