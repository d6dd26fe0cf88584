from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from calibration.activations import read_activations
from calibration.inputs import write_inputs
from calibration.sources import load_samples
from passes.chain import CheckpointBlocks, FloatChain
from passes.store import Store
from tests.models import opened_model
from vlmconvert.families.mllama.reference import Reference

pytestmark = pytest.mark.slow

SAMPLES = 3


@pytest.fixture
def chain(demo, store, tmp_path):
    model, samples, inputs = opened_model(demo, store), load_samples("scenes", SAMPLES), tmp_path / "inputs"
    inputs.mkdir()
    write_inputs(demo, samples, model.family, model.config, 0, inputs)
    blocks = CheckpointBlocks(model.checkpoint, model.templates)
    kept = Store(tmp_path / "store")
    counts = dict.fromkeys((component.name for component in model.components), SAMPLES)
    return FloatChain(kept, blocks, model.components, model.config, "", inputs, str, counts)


def numbers(chain):
    return {(component.name, block.name): chain.number(component, block) for component, block in chain.nodes}


def test_activations_are_those_of_the_checkpoint(chain, demo):
    """What reaches the last block is transformers' last hidden state before the final norm."""
    model = Reference(demo).model
    seen = []
    model.model.language_model.norm.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    inputs = chain.inputs(numbers(chain)["language_model", "lm_head"])
    assert len(inputs) == SAMPLES
    for path, block_inputs in zip(sorted(chain.samples.iterdir()), inputs, strict=False):
        values = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
        patches = values["cross_attention_mask"].shape[-1] // 4
        tiles = (values["cross_attention_mask"] == 0)[:, 0, :, ::patches] & (
            values["full_text_row_masked_out_mask"][:, 0] == 1
        )
        with torch.no_grad():
            model(
                **{
                    name: values[name]
                    for name in ("input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
                },
                cross_attention_mask=tiles.long()[:, :, None],
            )
        actual = read_activations(block_inputs)["hidden_states"]
        np.testing.assert_allclose(actual, seen.pop().numpy(), atol=1e-3 * float(np.abs(actual).max()))


def test_activations_are_dropped_when_nobody_needs_them(chain):
    where = numbers(chain)
    layers = [where["language_model", f"layers.{index}"] for index in range(8)]
    chain.inputs(layers[4])
    chain.inputs(layers[5])
    assert chain._key(layers[2]) in chain.store
    chain.done(set(layers[:4]) | {where["language_model", "embed_tokens"]})
    assert chain._key(layers[2]) not in chain.store
    assert chain._key(layers[4]) in chain.store
    assert chain._key(where["language_model", "positions"]) in chain.store
    chain.clear()
    assert not any(chain._key(number) in chain.store for number in where.values())


def test_a_component_may_get_fewer_samples_than_an_earlier_one(chain):
    where = numbers(chain)
    whole = chain.inputs(where["language_model", "layers.1"])
    key = chain.inputs_key(where["language_model", "layers.1"], SAMPLES - 1)
    chain.clear()
    fewer = replace(chain, counts=chain.counts | {"language_model": SAMPLES - 1})
    found = fewer.inputs(where["language_model", "layers.1"])
    assert len(found) == SAMPLES - 1 < len(whole)
    assert len(fewer.inputs(where["vision_encoder", "multi_modal_projector"])) == SAMPLES
    assert fewer.inputs_key(where["language_model", "layers.1"]) == key


def test_values_seen_on_the_way_are_kept_and_inputs_are_not(chain):
    where = numbers(chain)
    first, second = (where["vision_encoder", f"global_transformer.layers.{index}"] for index in (0, 1))

    class Watched:
        def compute(self, component, block):
            compute = chain.blocks.compute(component, block)
            return lambda values: (made := compute(values)) | {"mean": made["hidden_states"].mean(keepdims=True)}

    seen = [load_file(path) for path in chain.observe(first, "mean", Watched(), SAMPLES - 1)]
    assert [list(values) for values in seen] == [["mean"]] * (SAMPLES - 1)
    made = [read_activations(inputs)["hidden_states"] for inputs in chain.inputs(second)]
    assert [float(values["mean"].item()) for values in seen] == [float(value.mean()) for value in made[: SAMPLES - 1]]
    chain.observe(second, "mean", Watched(), SAMPLES)
    assert chain._key(first) not in chain.store
    assert chain._key(second) in chain.store


def test_a_later_block_finds_its_way_from_what_is_left(chain):
    where = numbers(chain)
    last = where["language_model", "lm_head"]
    expected = [read_activations(inputs) for inputs in chain.inputs(last)]
    for index in (7, 3):
        chain.store.remove(chain._key(where["language_model", f"layers.{index}"]))
    again = [read_activations(inputs) for inputs in chain.inputs(last)]
    for before, after in zip(expected, again, strict=True):
        np.testing.assert_array_equal(before["hidden_states"], after["hidden_states"])


def test_samples_that_are_computed_together_get_the_same_values(chain):
    """To the bit, since a limit for the memory must not change an artifact."""
    where = numbers(chain)
    last = where["language_model", "lm_head"]
    alone = [read_activations(inputs) for inputs in chain.inputs(last)]
    chain.clear()
    seen = []
    together = replace(
        chain,
        blocks=replace(chain.blocks, at_once=SAMPLES),
        at_once=SAMPLES,
        watch=lambda component, block: seen.append((component.name, block.name)),
    )
    for inputs, expected in zip(together.inputs(last), alone, strict=True):
        np.testing.assert_array_equal(read_activations(inputs)["hidden_states"], expected["hidden_states"])
    computed = [key for key in where if key != ("language_model", "lm_head")]
    assert seen == [key for key in computed for _ in range(SAMPLES)]


def test_a_failure_on_one_of_several_samples_leaves_nothing(chain):
    where = numbers(chain)
    several = replace(chain, blocks=replace(chain.blocks, at_once=SAMPLES), at_once=SAMPLES)
    first = where["vision_encoder", chain.components[0].blocks[0].name]

    def look(sample, *_):
        raise OSError(f"{sample} cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        several.visit(first, look)
    assert several._key(first) not in several.store
    assert not list(several.store.root.rglob(".making-*"))
