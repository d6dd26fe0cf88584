"""What streamed compression is compared with: a language model traced whole, and the same samples."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from calibration.inputs import write_inputs
from calibration.sources import load_samples
from tests.benchmarks import whole_graph
from tests.conftest import vlmconvert
from vlmconvert.families import load_family

LAYERS = 4
SAMPLES = 16
LANGUAGE_MODEL = "openvino_language_model.xml"


class Constants(dict[str, ov.Node]):
    """Constants of a graph by tensor name from `layers.N` on, whatever stands in front."""

    def __init__(self, model: ov.Model) -> None:
        self.model = model  # keeps them alive
        for node in model.get_ops():
            if node.get_type_name() == "Constant":
                name = node.get_friendly_name()
                self[re.sub(r"^.*?(?=layers\.|lm_head\.|embed_tokens\.)", "", name)] = node

    @property
    def int4(self) -> set[str]:
        """Names of those in 4 bit, but for zero points."""
        return {
            name
            for name, node in self.items()
            if node.get_element_type() == ov.Type.u4 and not name.endswith("zero_point")
        }

    def codes(self, name: str) -> np.ndarray:
        """The codes of one in 4 bit."""
        packed = self[name].data
        return np.stack([packed & 15, packed >> 4])


@pytest.fixture(scope="session")
def checkpoint(demo, tmp_path_factory) -> Path:
    """The demo with half of its layers: two with self-attention, two with cross-attention."""
    folder = shutil.copytree(demo, tmp_path_factory.mktemp("checkpoint") / "short")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["num_hidden_layers"] = LAYERS
    text["cross_attention_layers"] = [index for index in text["cross_attention_layers"] if index < LAYERS]
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if _kept(name)}, file)
    return folder


def _kept(name: str) -> bool:
    layer = re.search(r"language_model\.model\.layers\.(\d+)\.", name)
    return layer is None or int(layer[1]) < LAYERS


@pytest.fixture(scope="session")
def artifact(checkpoint, store, tmp_path_factory):
    """Options -> the artifact that they give, its vision encoder in float."""
    root = tmp_path_factory.mktemp("compressed")

    @cache
    def convert(*options: str) -> Path:
        output = root / "_".join(option.strip("-") for option in options)
        result = vlmconvert(
            "mllama",
            checkpoint,
            "--vision",
            "fp32",
            "--llm",
            "int4-awq",
            *options,
            "--no-validate",
            "--store",
            store,
            "-o",
            output,
        )
        assert result.exit_code == 0, result.output
        return output

    return convert


@pytest.fixture(scope="session")
def streamed(artifact):
    """Options -> constants of the language model that they give."""
    return lambda *options: Constants(ov.Core().read_model(artifact(*options) / LANGUAGE_MODEL))


@pytest.fixture(scope="session")
def model(checkpoint):
    """The checkpoint in torch."""
    return whole_graph.load(checkpoint)


@pytest.fixture(scope="session")
def language(model) -> ov.Model:
    """Its language model in one graph; NNCF is to be given a clone."""
    return whole_graph.language_model(model)


@pytest.fixture(scope="session")
def samples(checkpoint, model, language, tmp_path_factory) -> list[dict[str, np.ndarray]]:
    """What the samples of a conversion give the graph."""
    folder, family = tmp_path_factory.mktemp("inputs"), load_family("mllama")
    write_inputs(checkpoint, load_samples("scenes", SAMPLES), family, model.config.to_dict(), 0, folder)
    vision = whole_graph.WholeVisionEncoder(model)
    ports = [f"cross_attn_key_values.{index}.{part}" for index in vision.layers for part in ("key", "value")]
    found = []
    for path in sorted(folder.iterdir()):
        values = load_arrays(path)
        pixels = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        with torch.no_grad():
            outputs = vision(*(torch.from_numpy(values[name]) for name in pixels))[1:]
        values |= {name: value.numpy() for name, value in zip(ports, outputs, strict=True)}
        found.append({port.get_any_name(): values[port.get_any_name()] for port in language.inputs})
    return found


@pytest.fixture(scope="session")
def whole(language, samples):
    """Share of weights in 4 bit -> constants after one call of NNCF with AWQ on the whole graph."""

    def compress(ratio: float) -> Constants:
        return Constants(whole_graph.compress_int4_awq(language.clone(), samples, lambda sample: sample, ratio))

    return compress
