import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from calibration.activations import read_activations
from passes.checkpoint import open_checkpoint
from passes.store import Store
from vlmconvert.console import Reporter
from vlmconvert.families.mllama_reference import Reference
from vlmconvert.pipeline import Conversion
from vlmconvert.plan import Options

SAMPLES = 3


@pytest.fixture
def chain(demo, tmp_path):
    conversion = Conversion(
        "mllama", open_checkpoint(demo), Options(samples=SAMPLES, vision="fp32"), Store(tmp_path), 1, Reporter()
    )
    return conversion._calibrate()


def numbers(chain):
    return {(component.name, block.name): chain.number(component, block) for component, block in chain._nodes}


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
    chain.forget(set(layers[:4]) | {where["language_model", "embed_tokens"]})
    assert chain._key(layers[2]) not in chain.store
    assert chain._key(layers[4]) in chain.store
    assert chain._key(where["language_model", "positions"]) in chain.store
    chain.clear()
    assert not any(chain._key(number) in chain.store for number in where.values())


def test_a_later_block_finds_its_way_from_what_is_left(chain):
    where = numbers(chain)
    last = where["language_model", "lm_head"]
    expected = [read_activations(inputs) for inputs in chain.inputs(last)]
    for index in (7, 3):
        chain.store.remove(chain._key(where["language_model", f"layers.{index}"]))
    again = [read_activations(inputs) for inputs in chain.inputs(last)]
    for before, after in zip(expected, again, strict=True):
        np.testing.assert_array_equal(before["hidden_states"], after["hidden_states"])
