"""What it changes in the logits if some blocks of the float model are replaced by others, for many replacements in one walk.

One block of the float model is in memory at a time. Each replacement has activations of its own only after its first block.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.activations import activation_names, read_activations, write_activations
from passes.chain import BlockModels, Compute, FloatChain
from passes.validate.comparison import kl_divergence
from passes.vocabulary import Block, Component, HostStep

__all__ = ["effects"]


@dataclass(frozen=True)
class _Given:
    """A block that has been loaded already."""

    loaded: Compute

    def compute(self, component: Component, block: Block) -> Compute:
        """See `passes.chain.BlockModels`."""
        return self.loaded


def effects(
    chain: FloatChain,
    variants: Sequence[frozenset[int]],
    probes: BlockModels,
    answers: Mapping[str, int],
    step: Callable[[str], None] = lambda label: None,
) -> list[float]:
    """Mean KL divergence from the float model along the answers, in nats, for each of several replacements of blocks.

    The chain's activations are removed from the store as soon as no later block needs them.

    Args:
        chain: the float model and the samples; its last block makes the logits.
        variants: for each replacement, the numbers of the replaced blocks in the chain.
        probes: the blocks that take their place.
        answers: name of a sample's file -> position of the first token of its answer.
        step: called with a label after each block.
    """
    chain.store.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chain.store.root, prefix=".effects-") as folder:
        walk = _Walk(chain, variants, probes, answers, Path(folder))
        for number, (component, node) in enumerate(chain.nodes):
            walk.pass_by(number)
            if isinstance(node, Block):
                chain.done({number})
                step(f"{component.name}, block {node.name}")
    chain.clear()
    return [float(np.mean(np.concatenate(found))) for found in walk.divergences]


class _Walk:
    """A walk along the chain, with the activations of every replacement that differ from those of the float model."""

    def __init__(
        self,
        chain: FloatChain,
        variants: Sequence[frozenset[int]],
        probes: BlockModels,
        answers: Mapping[str, int],
        folder: Path,
    ) -> None:
        self._chain, self._variants, self._probes, self._answers, self._folder = (
            chain,
            variants,
            probes,
            answers,
            folder,
        )
        self._last = len(chain.nodes) - 1
        self.divergences: list[list[np.ndarray]] = [[] for _ in variants]

    def pass_by(self, number: int) -> None:
        """Compute one block or host step for the float model and all replacements that have begun."""
        component, node = self._chain.nodes[number]
        begun = [variant for variant, blocks in enumerate(self._variants) if min(blocks) <= number]
        if isinstance(node, HostStep):
            self._host_step(number, node, begun)
        else:
            self._block(number, component, node, begun)
        for producer in range(number + 1):
            if all(consumer <= number for consumer in self._chain.consumers[producer]):
                shutil.rmtree(self._folder / str(producer), ignore_errors=True)

    def _block(self, number: int, component: Component, block: Block, begun: Sequence[int]) -> None:
        compute = self._chain.blocks.compute(component, block)
        replaced = {variant for variant in begun if number in self._variants[variant]}
        probe = self._probes.compute(component, block) if replaced else compute

        def look(sample: str, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
            logits = self._judged(sample, outputs) if number == self._last else None
            for variant in begun:
                changed = self._changed(number, variant, sample)
                other = variant in replaced or changed
                made = (probe if variant in replaced else compute)(inputs | changed) if other else None
                if logits is not None:
                    found = logits if made is None else self._judged(sample, made)
                    self.divergences[variant].append(kl_divergence(logits, found).ravel())
                elif made is not None:
                    self._keep(number, variant, sample, made)

        self._chain.visit(number, look, _Given(compute))

    def _judged(self, sample: str, outputs: dict[str, np.ndarray]) -> np.ndarray:
        """The logits that predict the tokens of a sample's answer; those of its last token, if the answer is cut off."""
        (logits,) = outputs.values()
        last = logits.shape[1] - 1
        return np.array(logits[:, min(self._answers[sample], last) - 1 : max(last, 1)])

    def _host_step(self, number: int, step: HostStep, begun: Sequence[int]) -> None:
        for inputs in self._chain.available(number):
            sample = next(iter(inputs.values()))[0].name
            for variant in begun:
                if changed := self._changed(number, variant, sample):
                    made = step(read_activations(inputs) | changed, self._chain.config)
                    self._keep(number, variant, sample, made)

    def _changed(self, number: int, variant: int, sample: str) -> dict[str, np.ndarray]:
        """The inputs of a block, by port, that a replacement has changed."""
        found = {}
        for port, (producer, name) in self._chain.producers[number].items():
            file = self._file(producer, variant, sample)
            if name in activation_names(file):
                found[port] = (file, name)
        return read_activations(found)

    def _keep(self, number: int, variant: int, sample: str, made: dict[str, np.ndarray]) -> None:
        """Keep the outputs that later blocks read."""
        wanted = self._chain.wanted(number)
        if kept := {port: value for port, value in made.items() if port in wanted}:
            file = self._file(number, variant, sample)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_activations(file, kept)

    def _file(self, producer: int, variant: int, sample: str) -> Path:
        return self._folder / str(producer) / str(variant) / sample
