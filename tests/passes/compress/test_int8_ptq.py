"""int8-ptq block by block against one `nncf.quantize` call on the whole component, stitched in float."""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.numpy import load_file
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaConfig

from calibration.inputs import write_inputs
from calibration.sources import load_samples
from manifests.errors import ConversionError
from passes.block_pass import SplitBlocks
from passes.chain import CheckpointBlocks, FloatChain
from passes.compress.int8_ptq import QuantizeInt8PtqPass
from passes.compress.observed import WatchedBlocks, observation_of, observe_kinds
from passes.export.ir import write
from passes.export.openvino import ExportedBlocks, ExportOpenvinoPass
from passes.export.stitch import StitchPass
from passes.onnx.compressed import Activation, CompressedGraph, QuantizedWeight
from passes.store import Store
from passes.vocabulary import Component
from tests.checkpoints import write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.models import opened_model
from vlmconvert.families import demo_checkpoint
from vlmconvert.families.opened import OpenedModel

pytestmark = pytest.mark.slow

SAMPLES = 2
# Random towers: family -> options of the checkpoint.
LLAVA = {
    "clip": {},
    "clip, last layer, all features": {"layer": -1, "strategy": "full"},
    "clip, two layers": {"layer": [1, -1], "dtype": torch.float32},
    "siglip": {"vision": "siglip", "strategy": "full"},
    "siglip, two layers, no bias": {
        "vision": "siglip",
        "strategy": "full",
        "layer": [0, -2],
        "multimodal_projector_bias": False,
    },
    "siglip, llava-next": {"vision": "siglip", "strategy": "full", "family": "llava-next"},
    "clip, llava-next, float16": {"family": "llava-next", "dtype": torch.float16},
}
MLLAMA = {
    "mllama, narrow": {"hidden_size": 32, "attention_heads": 2, "intermediate_size": 96},
    "mllama, one global layer": {"num_global_layers": 1, "intermediate_layers_indices": [0, 2], "num_hidden_layers": 3},
    "mllama, deep": {
        "num_hidden_layers": 5,
        "intermediate_layers_indices": [1, 3, 4],
        "hidden_size": 48,
        "attention_heads": 3,
    },
}


def write_mllama(folder, **vision):
    """A random checkpoint with the demo's processor, a short text model, and another vision encoder."""
    demo = demo_checkpoint("mllama")
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((demo / "config.json").read_text())
    own = config["vision_config"] | vision
    own["vision_output_dim"] = own["hidden_size"] * (1 + len(own["intermediate_layers_indices"]))
    text = config["text_config"] | {"num_hidden_layers": 3, "cross_attention_layers": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": own, "text_config": text}))
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(MllamaConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif parameter.numel() == 1:
                parameter.fill_(0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


KEPT = ("llava demo",)


@pytest.fixture(scope="module", params=exhaustive_but(KEPT, ["mllama demo", "llava demo", *LLAVA, *MLLAMA]))
def tower(request, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    checkpoint = folder / "checkpoint"
    if request.param.endswith("demo"):
        checkpoint = demo_checkpoint(request.param.split()[0])
    elif request.param in LLAVA:
        write_checkpoint(checkpoint, **LLAVA[request.param])
    else:
        write_mllama(checkpoint, **MLLAMA[request.param])
    options = ("--llm", "fp16", "--vision", "int8-ptq", "--vision-samples", SAMPLES, "--no-validate", "--workers", 1)
    options = (*options, "--calibration", "scenes")
    result = vlmconvert("convert", checkpoint, *options, "-o", folder / "ours", "--store", store)
    assert result.exit_code == 0, result.output
    opened = opened_model(checkpoint, store)
    component = next(part for part in opened.components if part.side == "vision" and part.calibrated)
    blocks = ExportedBlocks(ExportOpenvinoPass("f32"), SplitBlocks(component, opened.checkpoint, opened.templates, ""))
    xml = next((folder / "ours").glob("openvino_vision_e*.xml"))
    whole = folder / "whole.xml"
    write(*StitchPass().join(component, map(blocks.detached, range(len(component.blocks)))), whole)
    inputs = folder / "inputs"
    inputs.mkdir()
    write_inputs(checkpoint, load_samples("scenes", SAMPLES), opened.family, opened.config, 0, inputs)
    names = [port.name for port in component.inputs]
    samples = [{name: load_file(path)[name] for name in names} for path in sorted(inputs.iterdir())]
    quantized = nncf.quantize(
        ov.Core().read_model(whole),
        nncf.Dataset(samples),
        subset_size=SAMPLES,
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=0.6)
        ),
    )
    ov.save_model(quantized, folder / "quantized.xml", compress_to_fp16=False)
    names = sorted(component.tensor_names())
    ours, nncfs = (quantized_layers(CompressedGraph(path), names) for path in (xml, folder / "quantized.xml"))
    return Tower(ours, nncfs, opened, component, inputs)


@dataclass
class Tower:
    """The quantized layers of our graph and of NNCF's, the checkpoint's vision encoder, and the inputs of the samples."""

    ours: dict[str, tuple[np.ndarray, Activation]]
    whole: dict[str, tuple[np.ndarray, Activation]]
    opened: OpenedModel
    component: Component
    inputs: Path


def quantized_layers(graph, names):
    """The layers of a graph whose weights are quantized: tensor -> its codes, and what is done to its input."""
    found = {}
    for name in names:
        with suppress(ConversionError):
            weight = graph.weight(name)
            if isinstance(weight, QuantizedWeight):
                place = weight.codes.place
                with place.file.open("rb") as file:
                    file.seek(place.offset)
                    codes = np.frombuffer(file.read(place.size), np.int8)
                found[name] = codes, graph.activation(name.removesuffix(".weight"))
    return found


def test_the_same_layers_are_quantized(tower):
    assert tower.ours.keys() == tower.whole.keys()
    assert tower.ours


def test_codes_are_equal(tower):
    shares = {name: float((tower.ours[name][0] == tower.whole[name][0]).mean()) for name in tower.whole}
    assert min(shares.values()) >= 0.99, shares


def test_ranges_of_activations_are_equal(tower):
    for name in tower.whole:
        one, other = tower.ours[name][1], tower.whole[name][1]
        assert one.scale == pytest.approx(other.scale, rel=1e-3), name
        assert one.zero_point == other.zero_point, name
        assert (one.factors is None) == (other.factors is None), name
        if one.factors is not None:
            assert np.allclose(one.factors.read().ravel(), other.factors.read().ravel(), rtol=1e-3), name


def test_watching_changes_no_activation(tower, tmp_path):
    """Other components get the same inputs, whether this one is quantized or not."""
    templates, checkpoint, component = tower.opened.templates, tower.opened.checkpoint, tower.component
    blocks, counts = CheckpointBlocks(checkpoint, templates), {component.name: SAMPLES}
    chain = FloatChain(Store(tmp_path), blocks, (component,), tower.opened.config, "", tower.inputs, str, counts)
    item = QuantizeInt8PtqPass()
    made: dict[str, list[dict[str, np.ndarray]]] = {}
    for block in component.blocks:
        observe_kinds(item, templates, [(block.kind, ())], tmp_path)
        observation = observation_of(tmp_path / "observations.json", (block.kind, ()))
        for models in (blocks, WatchedBlocks(checkpoint, templates, observation)):
            outputs: list[dict[str, np.ndarray]] = []
            chain.visit(
                chain.number(component, block),
                lambda _name, _inputs, values, kept=outputs: kept.append(
                    {key: np.array(value) for key, value in values.items()}
                ),
                models,
            )
            made[type(models).__name__] = outputs
        for plain, watched in zip(made["CheckpointBlocks"], made["WatchedBlocks"], strict=True):
            for port, value in plain.items():
                np.testing.assert_array_equal(watched[port], value, f"{block.name}: {port}")
