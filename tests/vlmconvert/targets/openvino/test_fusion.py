"""Stitching blocks must not cost speed: OpenVINO finds the same fused kernels in them as in a graph traced whole."""

import json
from collections import Counter

import openvino as ov
import pytest

from tests.benchmarks import whole_graph as peer
from tests.conftest import exhaustive_but

FUSED = ("RoPE", "RMS", "ScaledDotProductAttention", "FullyConnected")


def kernels(path) -> Counter[str]:
    """How many of each fused kernel the CPU plugin runs; attention counts if it has taken the cache in.

    Computing in float32 is asked for by its own option: with the hint ACCURACY the plugin multiplies 4-bit weights without its
    fused kernel on some processors.
    """
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [node["layerType"].astype(str) for node in nodes]
    for node, kind in zip(nodes, kinds, strict=True):
        if kind == "ScaledDotProductAttention":
            assert "kv_cache_precision" in node
    return Counter(kind for kind in kinds if kind in FUSED)


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    # From a file, as in use: only then does the plugin see the folded constants that it looks for in RoPE.
    path = tmp_path_factory.mktemp("whole") / "language.xml"
    ov.save_model(peer.stateful_language_model(peer.load(demo)), path)
    return kernels(path)


@pytest.mark.parametrize("precision", exhaustive_but(["fp32"], ["fp32", "int4-awq"]))
def test_the_same_kernels_as_in_the_whole_graph(build, whole, precision):
    folder = build("--llm", precision, "--vision", "fp32")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    layers, cross = text["num_hidden_layers"], len(text["cross_attention_layers"])
    found = kernels(folder / "openvino_language_model.xml")
    assert found == whole
    assert found["RoPE"] == 2 * (layers - cross)  # queries and keys
    assert found["ScaledDotProductAttention"] == layers - cross
    assert (
        found["RMS"] == 2 * layers + cross + 1
    )  # around attention and MLP, of the cross-attention's queries, at the end
