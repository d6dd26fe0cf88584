"""What replaced blocks change in the logits, beside a whole walk through a model with these blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from calibration.inputs import write_inputs
from calibration.sources import load_samples
from passes.chain import CheckpointBlocks, FloatChain
from passes.effects import effects
from passes.store import Store
from passes.validate.comparison import kl_divergence
from tests.models import opened_model
from vlmconvert.families import demo_checkpoint

pytestmark = pytest.mark.slow

SAMPLES = 3


@dataclass(frozen=True)
class Disturbed:
    """The blocks of a checkpoint, of which some return something else; all do, if none are named."""

    blocks: CheckpointBlocks
    names: frozenset[tuple[str, str]] = frozenset()

    def compute(self, component, block):
        whole = self.blocks.compute(component, block)
        if self.names and (component.name, block.name) not in self.names:
            return whole
        return lambda inputs: {port: noisy(value) for port, value in whole(inputs).items()}


def noisy(value):
    return value + np.float32(0.1 * value.std()) * np.cos(np.arange(value.size, dtype=np.float32)).reshape(value.shape)


@pytest.fixture
def chain(request, store, tmp_path):
    demo = demo_checkpoint(request.param)
    model, inputs = opened_model(demo, store), tmp_path / "inputs"
    inputs.mkdir()
    write_inputs(demo, load_samples("mixed", SAMPLES), model.family, model.config, 0, inputs)
    blocks = CheckpointBlocks(model.checkpoint, model.templates)
    counts = dict.fromkeys((component.name for component in model.components), SAMPLES)
    return FloatChain(Store(tmp_path / "store"), blocks, model.components, model.config, "", inputs, str, counts)


def logits(chain):
    found = []
    chain.visit(len(chain.nodes) - 1, lambda sample, inputs, outputs: found.append(outputs["logits"][:, -21:-1].copy()))
    chain.clear()
    return found


@pytest.mark.parametrize("chain", ["mllama", "llava"], indirect=True)
def test_each_replacement_changes_what_it_changes_in_a_whole_walk(chain):
    numbers = {(component.name, getattr(node, "name", "")): at for at, (component, node) in enumerate(chain.nodes)}
    names = [name for name in numbers if name[1].startswith("layers.")]
    last = next(name for name, number in numbers.items() if number == len(chain.nodes) - 1)
    variants = [frozenset(names[:1]), frozenset(names[2:4]), frozenset(names[-1:]), frozenset({last})]
    numbered = [frozenset(map(numbers.__getitem__, blocks)) for blocks in variants]
    answers = {path.name: len(load_file(path)["input_ids"][0]) - 20 for path in chain.samples.iterdir()}
    found = effects(chain, numbered, Disturbed(chain.blocks), answers)
    assert not any(path for path in chain.store.root.glob(".effects-*"))
    expected = logits(chain)
    for number, (blocks, value) in enumerate(zip(variants, found, strict=True)):
        disturbed = replace(chain, identity=f"{number}", blocks=Disturbed(chain.blocks, blocks))
        losses = [kl_divergence(one, other).ravel() for one, other in zip(expected, logits(disturbed), strict=True)]
        assert value == pytest.approx(np.concatenate(losses).mean(), rel=1e-3, abs=1e-9)
        assert value > 1e-9
