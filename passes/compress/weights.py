"""*compress-int8*, *compress-int4* and *compress-int4-awq*: weight compression of one block by `nncf.compress_weights`.

These passes do to a block what one NNCF call on the whole graph does to the same layers: decoder and encoder layers get the
precision of the pass, embeddings and LM head get 8 bit unless `all_layers`. Single layers may have a higher precision: `int8`
in a 4-bit block, and `fp16` in any block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from manifests.errors import BadInputError
from passes.base import Context, Effort, TransformPass, WeightBits
from passes.block_pass import BlockPass, FloatBlocks
from passes.compat.nncf import LEAST_GROUP_SIZE, adjusted_group_size, compress_int4
from passes.compress.nncf_output import quiet_nncf
from passes.compress.observed import Observation, ObservedSource, ObservingPass, layer_inputs
from passes.compress.pieces import compress_block
from passes.compress.sensitivity import MeasureSensitivityPass, ScoredBlocks, layers_in_8_bit
from passes.export.openvino import save_block
from passes.export.template import BlockSource
from passes.formats import FLOAT, INT8, VECTOR_BITS, stored_bits
from passes.vocabulary import operation_name

if TYPE_CHECKING:
    import nncf
    import openvino as ov

__all__ = ["CompressInt4AwqPass", "CompressInt4Pass", "CompressInt8Pass"]


@dataclass(frozen=True)
class CompressInt8Pass(BlockPass):
    """8-bit weights with one scale per output channel, and with zero points unless `symmetric`."""

    name = "compress-int8"
    overrides = (FLOAT,)

    symmetric: bool = False

    def run(self, source: BlockSource, output: Path) -> None:
        compress_block(lambda part: _int8(part.model(), part, self.symmetric), source, output)

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits | None:
        return WeightBits(stored_bits(INT8, shape) if len(shape) > 1 else VECTOR_BITS)


@dataclass(frozen=True)
class CompressInt4Pass(BlockPass):
    """4-bit weights in groups of input channels, computed from the weights alone.

    Attributes:
        group_size: number of input channels that share a scale; -1 for whole rows.
        symmetric: whether zero points are left out.
        ratio: maximum share of the component's weights in 4 bit, chosen by `passes.compress.sensitivity`; the others get 8 bit.
        all_layers: whether embeddings and LM head get 4 bit too.
    """

    name = "compress-int4"
    overrides: ClassVar[tuple[str, ...]] = (INT8, FLOAT)

    group_size: int = 64
    symmetric: bool = False
    ratio: float = 1.0
    all_layers: bool = False

    def __post_init__(self) -> None:
        if self.group_size != -1 and (self.group_size < LEAST_GROUP_SIZE or self.group_size & (self.group_size - 1)):
            raise BadInputError(
                f"group size {self.group_size} is not possible: use a power of two from {LEAST_GROUP_SIZE}, or -1 for whole "
                "rows"
            )
        if not 0 < self.ratio <= 1:
            raise BadInputError(f"ratio {self.ratio} is not a share: use a number above 0 and up to 1")

    def in_4_bit(self, role: str) -> bool:
        """Whether blocks of this role are compressed to 4 bit."""
        return role == "layer" or (self.all_layers and role != "glue")

    def prerequisites(self) -> tuple[TransformPass, ...]:
        return (MeasureSensitivityPass(self.group_size),) if self.ratio < 1 else ()

    def layers(self, blocks: FloatBlocks, context: Context) -> Mapping[str, str]:
        """The precisions in the recipe, and 8 bit for the most sensitive layers if only a share may be in 4 bit."""
        if not isinstance(blocks, ScoredBlocks) or self.ratio == 1:
            return context.layers
        ranked = [index for index, block in enumerate(blocks.component.blocks) if self.in_4_bit(block.role)]
        chosen = layers_in_8_bit(blocks.scores(ranked), self.ratio)
        return dict.fromkeys(chosen, INT8) | dict(context.layers)

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits | None:
        if len(shape) < 2:
            return WeightBits(VECTOR_BITS)
        in_8_bit = stored_bits(INT8, shape)
        if not self.in_4_bit(role):
            return WeightBits(in_8_bit)
        group = adjusted_group_size(shape[-1], self.group_size)
        not_divisible = f"{layer}: {shape[-1]} channels, not divisible by {self.group_size}"
        if group is None:
            return WeightBits(in_8_bit, f"{not_divisible} or any group from {LEAST_GROUP_SIZE}: int8 per row")
        bits = 4 + (16 + (0 if self.symmetric else 4)) / (shape[-1] if group == -1 else group)
        bits = self.ratio * bits + (1 - self.ratio) * in_8_bit
        return WeightBits(bits, None if group == self.group_size else f"{not_divisible}: group {group}")

    def override_bits(self, precision: str, shape: tuple[int, ...]) -> float:
        """See `TransformPass`."""
        return stored_bits(precision, shape, self.symmetric)

    def run(self, source: BlockSource, output: Path) -> None:
        if self.joins_rows(source.block.role):
            save_block(self._compressed(source), source, output)
        else:
            compress_block(self._compressed, source, output)

    def joins_rows(self, role: str) -> bool:
        """Whether the result for a row of a weight in such a block depends on other rows."""
        return False

    def _compressed(self, source: BlockSource) -> ov.Model:
        in_4_bit = self.in_4_bit(source.block.role)
        model = self.to_int4(source) if in_4_bit else source.model()
        if not in_4_bit or INT8 in source.layers.values():
            model = _int8(model, source, symmetric=False)
        return model

    def to_int4(self, source: BlockSource, awq: bool = False) -> ov.Model:
        """Compress to 4 bit all layers but those that have another precision in `source.layers`."""
        return self.rounded_to_int4(source.model(), source.layers, self.group_size, awq)

    def rounded_to_int4(self, model: ov.Model, others: Iterable[str], group_size: int, awq: bool = False) -> ov.Model:
        """Compress to 4 bit all layers of a graph, in groups of this size, but those of `others`."""
        import nncf

        with quiet_nncf():
            return nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_SYM if self.symmetric else nncf.CompressWeightsMode.INT4_ASYM,
                group_size=group_size,
                all_layers=True,  # of this block: `in_4_bit` decides about the component's embeddings and LM head
                awq=awq,
                ignored_scope=_ignored(others),
                advanced_parameters=nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
                ),
            )


@dataclass(frozen=True)
class CompressInt4AwqPass(ObservingPass, CompressInt4Pass):
    """4-bit weights with AWQ (Lin et al., 2023) and NNCF's scale estimation, by the activations that reach the block.

    Attributes:
        scale_estimation: whether the scales minimize the error of a layer's outputs, instead of that of its weights.
        data_free: whether AWQ uses the weights alone, by NNCF's method; scale estimation is not possible then.
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

    def joins_rows(self, role: str) -> bool:
        """See `CompressInt4Pass`."""
        return self.in_4_bit(role)

    def effort(self, role: str) -> Effort | None:
        """See `TransformPass`; scale estimation tries many scales for each group."""
        if not self.in_4_bit(role):
            return super().effort(role)
        return Effort(1.5, 80.0 if self.scale_estimation else 25.0, 100_000_000)

    def observe(self, model: ov.Model, floats: Sequence[str]) -> Observation:
        """See `ObservingPass`."""
        return layer_inputs(model)

    def to_int4(self, source: BlockSource, awq: bool = True) -> ov.Model:
        """See `CompressInt4Pass`."""
        if self.data_free:
            return super().to_int4(source, awq)
        assert isinstance(source, ObservedSource)
        model, gather = source.observed_model()
        samples, ignored = len(source.statistics), _ignored(source.layers)
        with quiet_nncf():
            return compress_int4(
                model, gather, samples, self.group_size, self.symmetric, awq, self.scale_estimation, ignored
            )


def _int8(model: ov.Model, source: BlockSource, symmetric: bool) -> ov.Model:
    """Compress to 8 bit all layers that are still float, except those with `fp16` in `source.layers`."""
    import nncf

    if source.block.role == "glue":
        return model
    floats = _ignored(tensor for tensor, precision in source.layers.items() if precision == FLOAT)
    mode = nncf.CompressWeightsMode.INT8_SYM if symmetric else nncf.CompressWeightsMode.INT8_ASYM
    with quiet_nncf():
        return nncf.compress_weights(model, mode=mode, ignored_scope=floats)


def _ignored(tensors: Iterable[str]) -> nncf.IgnoredScope:
    """The operations that read these weights; see `BlockSource.template`.

    NNCF does not validate the names, since a table that is read as a whole is not an operation that it finds.
    """
    import nncf

    return nncf.IgnoredScope(names=[operation_name(tensor) for tensor in sorted(tensors)], validate=False)
