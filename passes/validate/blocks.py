"""*validate-blocks*: the error of each block by itself, which shows where quality is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from manifests.evaluation import BlockError
from passes.base import Pass
from passes.chain import BlockModels, Compute, FloatChain

__all__ = ["ValidateBlocksPass"]


@dataclass(frozen=True)
class ValidateBlocksPass(Pass):
    """Compare the output of each block with that of the reference's block, on the activations of the reference.

    Errors do not add up over the blocks, so a bad block stands out. For a block with several outputs, the one with the
    largest relative error counts.
    """

    name = "validate-blocks"

    def __call__(
        self, chain: FloatChain, artifact: BlockModels, step: Callable[[str], None] = lambda label: None
    ) -> list[BlockError]:
        """Measure every block that any sample of `chain` reaches, in all components.

        Only one block of the reference and one of the artifact are in memory at a time. The chain's activations are removed
        from the store as soon as no later block needs them.

        Args:
            chain: the blocks of the reference and the samples.
            artifact: the blocks to measure.
            step: called with a label after each block.
        """
        errors = []
        for component in chain.components:
            for block in component.blocks:
                number = chain.number(component, block)
                if chain.inputs(number):
                    ports = self._ports(chain, number, artifact.compute(component, block))
                    port = max(ports, key=lambda sums: sums.relative_error)
                    errors.append(
                        BlockError(
                            component=component.name,
                            block=block.name,
                            cosine=float(f"{port.cosine:.6g}"),
                            relative_error=float(f"{port.relative_error:.6g}"),
                        )
                    )
                chain.done({number})
                step(f"{component.name}, block {block.name}")
        chain.clear()
        return errors

    def _ports(self, chain: FloatChain, number: int, compute: Compute) -> list[_Sums]:
        """Compare every output of one block."""
        sums: dict[str, _Sums] = {}

        def look(_: str, inputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
            actual = compute(inputs)
            for name, value in expected.items():
                sums.setdefault(name, _Sums()).add(value, actual[name])

        chain.visit(number, look)
        return list(sums.values())


@dataclass
class _Sums:
    """Sums over all samples for one output of a block, from which its errors are computed."""

    product: float = 0.0
    expected: float = 0.0
    actual: float = 0.0
    difference: float = 0.0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """Add one sample; if the artifact computes only the last position, it is compared with the reference's last."""
        last = tuple(slice(have - want, None) for have, want in zip(expected.shape, actual.shape, strict=True))
        one, other = expected[last].ravel().astype(np.float64), actual.ravel().astype(np.float64)
        self.product += float(one @ other)
        self.expected += float(one @ one)
        self.actual += float(other @ other)
        one -= other
        self.difference += float(one @ one)

    @property
    def cosine(self) -> float:
        if not self.expected or not self.actual:
            return float(self.expected == self.actual)
        return self.product / (self.expected * self.actual) ** 0.5

    @property
    def relative_error(self) -> float:
        if not self.expected:
            return float(self.actual > 0)
        return (self.difference / self.expected) ** 0.5
