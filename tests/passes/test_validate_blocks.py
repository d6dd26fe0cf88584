import json

import pytest
from safetensors.numpy import load_file

from calibration.activations import write_activations
from calibration.inputs import write_inputs
from calibration.sources import load_samples
from manifests.errors import BadInputError
from manifests.io import read_manifest
from passes.chain import CheckpointBlocks, FloatChain
from passes.store import Store
from passes.validate.blocks import ValidateBlocksPass
from tests.conftest import exhaustive_but
from tests.garbage import GARBAGE, copy, rehash, zero_norm
from tests.models import opened_model
from vlmconvert.families import load_family
from vlmconvert.measuring.blocks import artifact_blocks, block_errors
from vlmconvert.running.open import open_runner
from vlmconvert.targets.openvino.target import TARGET as OPENVINO

pytestmark = pytest.mark.slow

OPTIONS = ("--llm", "int4", "--vision", "int8-ptq", "--vision-samples", "8")
SAMPLES = 2


@pytest.fixture(scope="module")
def good(build):
    return build(*OPTIONS)


@pytest.fixture(scope="module")
def parts(good, tmp_path_factory):
    """The components by name, and inputs for each of them alone: to the language model the good encoder's keys and values."""
    folder = tmp_path_factory.mktemp("inputs")
    runner = open_runner(good)
    write_inputs(good, load_samples("scenes", SAMPLES), load_family("mllama"), runner.config, 0, folder)
    runner.family = type("Ready", (), {"inputs": staticmethod(lambda values, _config: values)})
    for path in folder.iterdir():
        values = load_file(path)
        write_activations(path, values | runner.encode_images(values))
    components = load_family("mllama").components(runner.config)
    return {component.name: component for component in components}, folder


def blocks_of(folder):
    return artifact_blocks(folder, read_manifest(folder))


def test_float_blocks_of_an_artifact_are_those_of_the_checkpoint(build, demo):
    errors = block_errors(build("--llm", "fp32", "--vision", "fp32"), demo, load_samples("scenes", SAMPLES))
    assert len(errors) == 24
    assert {item.component for item in errors} == {"vision_encoder", "language_model"}
    assert max(item.relative_error for item in errors) < 1e-6
    assert min(item.cosine for item in errors) > 1 - 1e-6


@pytest.mark.parametrize("spoil", exhaustive_but(list(GARBAGE)[:1], GARBAGE))
def test_a_published_bad_build_is_traced_to_its_blocks(good, parts, tmp_path, spoil):
    """Its manifest fits the bad files, so only the last good build tells."""
    bad = copy(good, tmp_path / "bad")
    spoil(bad)
    rehash(bad)
    components, inputs = parts
    name, blocks = GARBAGE[spoil]
    chain = FloatChain(
        Store(tmp_path / "store"), blocks_of(good), (components[name],), {}, "", inputs, str, {name: SAMPLES}
    )
    errors = ValidateBlocksPass()(chain, blocks_of(bad))
    assert {(item.component, item.block) for item in errors if item.relative_error > 0} == {
        (name, block) for block in blocks
    }
    assert not list((tmp_path / "store").glob("*/*/*")), "activations are left"


def test_a_bad_build_stands_out_beside_the_checkpoint(good, parts, demo, store, tmp_path):
    bad = copy(good, tmp_path / "bad")
    zero_norm(bad)
    components, inputs = parts
    opened = opened_model(demo, store)
    blocks = CheckpointBlocks(opened.checkpoint, opened.templates)
    bound = components["language_model"].bound(opened.templates.shapes)
    chain = FloatChain(Store(tmp_path / "store"), blocks, (bound,), {}, "", inputs, str, {bound.name: SAMPLES})
    before, after = (ValidateBlocksPass()(chain, blocks_of(folder)) for folder in (good, bad))
    assert all(item.relative_error < 0.5 and item.cosine > 0.9 for item in before)
    grown = [new.block for old, new in zip(before, after, strict=True) if new.relative_error > 2 * old.relative_error]
    assert grown == ["layers.3"]


def test_artifacts_of_different_models_are_refused(good, tmp_path):
    other = copy(good, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["cross_attention_layers"] = [1]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="do not have the same blocks"):
        block_errors(other, good, load_samples("scenes", 1))


def test_every_weight_belongs_to_a_block(good):
    """The digests of blocks cover the .bin but for its alignment."""
    from passes.export.checksums import block_constants

    config = json.loads((good / "config.json").read_text())
    records = {item.name: item for item in read_manifest(good).components}
    for component in load_family("mllama").components(config):
        xml = good / f"{OPENVINO.stem(component)}.xml"
        constants = block_constants(xml, component)
        assert set(constants) == {block.name for block in component.blocks} == set(records[component.name].blocks)
        end = gaps = 0
        for offset, size in sorted({place for places in constants.values() for place in places}):
            gaps += max(0, offset - end)
            end = max(end, offset + size)
        assert gaps < 64 * len(constants) * 100
        assert end == xml.with_suffix(".bin").stat().st_size
