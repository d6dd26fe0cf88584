"""*validate-blocks*: where quality is lost, block by block."""

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
    """Each block's output beside that of the reference's block, on the activations of the reference.

    Errors do not add up over the blocks, so a bad block stands out. Of a block with several outputs the one with the
    greatest relative error counts.
    """

    name = "validate-blocks"

    def __call__(
        self, chain: FloatChain, artifact: BlockModels, step: Callable[[str], None] = lambda label: None
    ) -> list[BlockError]:
        """Measure every block of every component that any sample of `chain` reaches.

        Only one block's weights of each side are in memory at a time. The chain's activations are removed from its store
        as soon as no later block needs them.

        Args:
            chain: the reference: its blocks and the samples.
            artifact: the blocks to measure.
            step: called with a label after each block.
        """
        errors = []
        done: set[int] = set()
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
                done.add(number)
                chain.forget(done)
                step(f"{component.name}, block {block.name}")
        chain.clear()
        return errors

    def _ports(self, chain: FloatChain, number: int, compute: Compute) -> list[_Sums]:
        """Compare every output of one block."""
        sums: dict[str, _Sums] = {}

        def look(inputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
            actual = compute(inputs)
            for name, value in expected.items():
                sums.setdefault(name, _Sums()).add(value, actual[name])

        chain.visit(number, look)
        return list(sums.values())


@dataclass
class _Sums:
    """Sums over all samples of one output."""

    product: float = 0.0
    expected: float = 0.0
    actual: float = 0.0
    difference: float = 0.0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """Add a sample; of a graph that computes the last position only, the reference's last position counts."""
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
