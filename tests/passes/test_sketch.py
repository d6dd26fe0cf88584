from math import prod

import pytest

from calibration.activations import read_file
from calibration.inputs import write_inputs
from calibration.sources import load_samples
from passes.chain import CheckpointBlocks, FloatChain
from passes.sketch import sketch
from passes.store import Store
from tests.models import opened_model
from vlmconvert.families import demo_checkpoint

FAMILIES = ["mllama", "llava"]


@pytest.fixture(params=FAMILIES)
def sample(request, store, tmp_path):
    """A model, the inputs of a sample, and the float chain that has computed all blocks on it."""
    folder = demo_checkpoint(request.param)
    model, inputs = opened_model(folder, store), tmp_path / "inputs"
    inputs.mkdir()
    write_inputs(folder, load_samples("scenes", 1), model.family, model.config, 0, inputs)
    counts = dict.fromkeys((component.name for component in model.components), 1)
    blocks = CheckpointBlocks(model.checkpoint, model.templates)
    chain = FloatChain(Store(tmp_path / "store"), blocks, model.components, model.config, "", inputs, str, counts)
    return model, read_file(next(inputs.iterdir())), chain


def test_bytes_are_those_that_the_chain_keeps(sample):
    model, values, chain = sample
    found = sketch(model.components, model.config, model.templates, values)
    assert found.inputs == sum(value.nbytes for value in values.values())
    assert [(block.component, block.block) for block in found.blocks] == [
        (component.name, block.name) for component in model.components for block in component.blocks
    ]
    kept = {}
    for component in model.components:
        for block in component.blocks:
            number = chain.number(component, block)
            chain.visit(number, lambda *_: None)
            files = list(chain.store.root.rglob("*.safetensors"))
            kept[component.name, block.name] = sum(value.nbytes for path in files for value in read_file(path).values())
            chain.done({number})
    measured = max(kept.values())
    assert max(block.kept for block in found.blocks) == pytest.approx(measured, rel=0.1)


def test_operations_are_those_of_the_matrix_products(sample):
    """Two for each weight of a linear layer and each token, and those of attention: four for each pair of tokens and channel."""
    model, values, _ = sample
    found = sketch(model.components, model.config, model.templates, values)
    language = model.components[-1]
    layer = next(block for block in language.blocks if block.role == "layer")
    shapes = model.templates.shapes[layer.kind]
    weights = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    tokens, hidden = values["input_ids"].shape[1], model.config["text_config"]["hidden_size"]
    [counted] = [
        block.operations for block in found.blocks if (block.component, block.block) == (language.name, layer.name)
    ]
    assert counted == 2 * weights * tokens + 4 * tokens**2 * hidden


def test_a_block_whose_input_is_missing_takes_nothing(sample):
    model, values, _ = sample
    text = {name: value for name, value in values.items() if name != "pixel_values"}
    found = sketch(model.components, model.config, model.templates, text)
    assert not any(block.component == model.components[0].name for block in found.blocks)
