"""Weight compression of one block, through `nncf.compress_weights`.

What these passes do to a block is what one call of NNCF on the whole graph does to the same layers: the layers of the body
in the asked precision, embeddings and LM head in 8 bit unless `all_layers`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.activations import read_activations
from manifests.errors import BadInputError
from passes.base import BlockPass
from passes.export.openvino import save_block
from passes.export.template import BlockSource

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["CompressInt4AwqPass", "CompressInt4Pass", "CompressInt8Pass", "adjusted_group_size", "quiet_nncf"]

# NNCF's own lower limit for an adjusted group; below it a layer gets the 8-bit precision.
_LEAST_GROUP = 32


def adjusted_group_size(channels: int, group_size: int) -> int | None:
    """The group size that a layer of `channels` input channels gets, or None if it falls back to 8 bit.

    It is NNCF's rule (`GroupSizeFallbackMode.ADJUST`): the largest power of two that divides the channels, at least 32.
    """
    if group_size == -1 or channels % group_size == 0:
        return group_size
    largest = channels & -channels
    return largest if largest >= _LEAST_GROUP else None


@contextmanager
def quiet_nncf() -> Iterator[None]:
    """Keep NNCF's progress bars and messages off the terminal; the caller shows its own."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(StringIO()):
        yield


@dataclass(frozen=True)
class CompressInt8Pass(BlockPass):
    """8-bit weights, per output channel, asymmetric unless `symmetric`."""

    name = "compress-int8"

    symmetric: bool = False

    def run(self, source: BlockSource, output: Path) -> None:
        save_block(_int8(source.model(), source, self.symmetric), source, output)


@dataclass(frozen=True)
class CompressInt4Pass(BlockPass):
    """4-bit weights in groups along the input channels, from the weights alone.

    Attributes:
        group_size: input channels that share a scale; -1 for whole rows.
        symmetric: without zero points.
        ratio: greatest share of the component's weights in 4 bit, the rest in 8 bit; `passes.compress.sensitivity` chooses.
        all_layers: embeddings and LM head in 4 bit too.
    """

    name = "compress-int4"

    group_size: int = 64
    symmetric: bool = False
    ratio: float = 1.0
    all_layers: bool = False

    def __post_init__(self) -> None:
        if self.group_size != -1 and (self.group_size < _LEAST_GROUP or self.group_size & (self.group_size - 1)):
            raise BadInputError(
                f"group size {self.group_size} is not possible: use a power of two from {_LEAST_GROUP}, or -1 for whole rows"
            )
        if not 0 < self.ratio <= 1:
            raise BadInputError(f"ratio {self.ratio} is not a share: use a number above 0 and up to 1")

    def in_4_bit(self, role: str) -> bool:
        """Whether blocks of this role are compressed to 4 bit."""
        return role == "layer" or (self.all_layers and role != "glue")

    def run(self, source: BlockSource, output: Path) -> None:
        model = source.model()
        if self.in_4_bit(source.block.role):
            model = self._int4(model, source)
        if not self.in_4_bit(source.block.role) or source.in_8_bit:
            model = _int8(model, source, symmetric=False)
        save_block(model, source, output)

    def _int4(self, model: ov.Model, source: BlockSource) -> ov.Model:
        """Compress to 4 bit all layers but those that are to stay in 8 bit."""
        import nncf

        options: dict[str, Any] = {}
        if source.activations:
            options["dataset"] = nncf.Dataset(source.activations, read_activations)
            options["subset_size"] = len(source.activations)
        layers = [tensor.removesuffix(".weight") for tensor in sorted(source.in_8_bit)]
        with quiet_nncf():
            return nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_SYM if self.symmetric else nncf.CompressWeightsMode.INT4_ASYM,
                group_size=self.group_size,
                all_layers=True,  # of this block; `in_4_bit` has decided about the component's first and last
                ignored_scope=nncf.IgnoredScope(names=layers),
                advanced_parameters=nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
                ),
                **self._algorithms(),
                **options,
            )

    def _algorithms(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class CompressInt4AwqPass(CompressInt4Pass):
    """4-bit weights with AWQ (Lin et al., 2023) and NNCF's scale estimation, from the activations that reach the block.

    Attributes:
        scale_estimation: scales that make a layer's outputs exact, not its weights.
        data_free: AWQ from the weights alone (NNCF's way); there is no scale estimation then.
    """

    name = "compress-int4-awq"

    scale_estimation: bool = True
    data_free: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_free and self.scale_estimation:
            raise BadInputError(
                "scale estimation needs calibration samples: use --no-scale-estimation, or --samples 64"
            )

    def needs_activations(self, role: str) -> bool:
        return self.in_4_bit(role) and not self.data_free

    def _algorithms(self) -> dict[str, Any]:
        return {"awq": True, "scale_estimation": self.scale_estimation}


def _int8(model: ov.Model, source: BlockSource, symmetric: bool) -> ov.Model:
    import nncf

    if source.block.role == "glue":
        return model
    mode = nncf.CompressWeightsMode.INT8_SYM if symmetric else nncf.CompressWeightsMode.INT8_ASYM
    with quiet_nncf():
        return nncf.compress_weights(model, mode=mode)
