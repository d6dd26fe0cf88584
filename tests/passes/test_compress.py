"""Streamed compression against one call of NNCF on the whole graph."""

from __future__ import annotations

import re
import shutil

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from passes.checkpoint import open_checkpoint
from passes.compress.sensitivity import LayerScore, layers_in_8_bit
from passes.compress.weights import adjusted_group_size
from passes.store import Store
from tests.benchmarks import whole_graph
from tests.conftest import vlmconvert
from vlmconvert.console import Reporter
from vlmconvert.pipeline import Conversion
from vlmconvert.plan import Options

SAMPLES = 16


def constants(model: ov.Model) -> dict[str, ov.Node]:
    """Constants by tensor name from `layers.N` on, whatever stands in front."""
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            found[re.sub(r"^.*?(?=layers\.|lm_head\.|embed_tokens\.)", "", node.get_friendly_name())] = node
    return found


def int4_names(nodes: dict[str, ov.Node]) -> set[str]:
    return {
        name
        for name, node in nodes.items()
        if node.get_element_type() == ov.Type.u4 and not name.endswith("zero_point")
    }


def codes(node: ov.Node) -> np.ndarray:
    packed = node.data
    return np.stack([packed & 15, packed >> 4])


def both_ways(demo, store: Store, ratio: float) -> tuple[dict[str, ov.Node], dict[str, ov.Node]]:
    """int4-awq of the demo's language model, in one piece and streamed, on the same samples."""
    options = Options(vision="fp32", samples=SAMPLES, ratio=ratio)
    conversion = Conversion("mllama", open_checkpoint(demo), options, store, 2, Reporter())
    model = whole_graph.load(demo)
    vision = whole_graph.WholeVisionEncoder(model)
    language = whole_graph.language_model(model)
    chain = conversion._calibrate()
    samples = []
    for path in sorted(chain.samples.iterdir())[:SAMPLES]:
        values = load_arrays(path)
        pixels = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        with torch.no_grad():
            outputs = vision(*(torch.from_numpy(values[name]) for name in pixels))[1:]
        ports = [f"cross_attn_key_values.{index}.{part}" for index in vision.layers for part in ("key", "value")]
        values |= {name: value.numpy() for name, value in zip(ports, outputs, strict=True)}
        samples.append({port.get_any_name(): values[port.get_any_name()] for port in language.inputs})
    whole = whole_graph.compress_int4_awq(language, samples, lambda sample: sample, ratio)
    conversion.build()
    built = conversion.built[1]
    streamed = ov.Core().read_model(built.folder / "openvino_language_model.xml")
    both_constants = constants(whole), constants(streamed)
    # Keeps the graphs that own the constants alive.
    both_constants[0]["_graph"], both_constants[1]["_graph"] = whole.get_results()[0], streamed.get_results()[0]
    return both_constants


@pytest.fixture(scope="module")
def both(demo, tmp_path_factory) -> tuple[dict[str, ov.Node], dict[str, ov.Node]]:
    return both_ways(demo, Store(tmp_path_factory.mktemp("store")), ratio=1.0)


def test_awq_without_data_is_that_of_the_whole_graph(demo, tmp_path):
    options = Options(vision="fp32", samples=0, scale_estimation=False)
    conversion = Conversion("mllama", open_checkpoint(demo), options, Store(tmp_path), 2, Reporter())
    assert not conversion.plan.calibrates_llm
    language = whole_graph.language_model(whole_graph.load(demo))
    settings = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 64, "all_layers": False}
    plain = constants(nncf.compress_weights(language.clone(), **settings))
    whole = constants(nncf.compress_weights(language, **settings, awq=True))
    conversion.build()
    streamed = constants(ov.Core().read_model(conversion.built[1].folder / "openvino_language_model.xml"))
    names = int4_names(whole)
    assert names == int4_names(streamed)
    assert any((codes(whole[name]) != codes(plain[name])).any() for name in names), "AWQ has changed nothing"
    for name in names:
        np.testing.assert_array_equal(codes(streamed[name]), codes(whole[name]), err_msg=name)


def test_the_same_layers_are_in_4_bit(both):
    whole, streamed = (int4_names(nodes) for nodes in both)
    assert whole == streamed
    # 4 self-attention layers with 7 linear layers, 4 cross-attention layers with 5.
    assert len(whole) == 4 * 7 + 4 * 5


def test_streamed_codes_equal_those_of_the_whole_graph(both):
    whole, streamed = both
    equal = total = 0
    for name in int4_names(whole):
        same = codes(whole[name]) == codes(streamed[name])
        equal, total = equal + int(same.sum()), total + same.size
    print(f"{equal} of {total} codes are equal, {equal / total:.4%}")
    assert equal / total >= 0.99


def test_streamed_scales_equal_those_of_the_whole_graph(both):
    whole, _ = both
    near_ties = []
    moved = total = 0
    for name in int4_names(whole):
        expected, actual = (nodes[f"{name}/scale"].data.astype(np.float32) for nodes in both)
        assert expected.shape == actual.shape
        difference = np.abs(actual / expected - 1)
        if difference.max() > 1e-3:
            near_ties.append(f"{name}: {(difference > 1e-3).sum()} of {difference.size} scales")
        moved, total = moved + int((difference > 1e-3).sum()), total + difference.size
    print("decided otherwise by a near-tie:", "; ".join(near_ties) or "none")
    # A near-tie in NNCF's search over AWQ scales moves single groups, never a layer.
    assert moved / total <= 1e-3, near_ties


def test_awq_leaves_every_norm_as_it_was(build, demo):
    """A norm that AWQ had folded a scale into would feed k/v projections that do not expect it."""
    artifact = build("--llm", "int4-awq", "--vision", "fp32", "--samples", "8")
    float_artifact = build("--llm", "fp16", "--vision", "fp32")
    graphs = [ov.Core().read_model(folder / "openvino_language_model.xml") for folder in (artifact, float_artifact)]
    compressed, original = (
        {name: node.data.astype(np.float32).ravel() for name, node in constants(graph).items() if "norm.weight" in name}
        for graph in graphs
    )
    assert len([name for name in original if "input_layernorm" in name]) == 8
    for name, expected in original.items():
        match = next(value for other, value in compressed.items() if other.startswith(name))
        np.testing.assert_array_equal(match, expected)
    # The k/v projections of cross-attention layers belong to the vision encoder, in float here.
    key_values = (artifact / "openvino_vision_encoder.bin").read_bytes()
    assert key_values == (float_artifact / "openvino_vision_encoder.bin").read_bytes()


@pytest.mark.parametrize(
    ("llm", "counts"),
    [
        ("fp32", {"f32"}),
        ("fp16", {"f16"}),
        ("int8", {"int8"}),
        ("int4", {"int4", "int8"}),
    ],
)
def test_weights_are_counted_from_the_artifact(build, llm, counts):
    from manifests.io import read_manifest

    manifest = read_manifest(build("--llm", llm, "--vision", "fp32"))
    weights = manifest.components[1].weights
    assert set(weights) == counts
    assert (
        sum(weights.values())
        == 8 * 3 * 128 * 384 + 4 * (2 * 128 * 128 + 2 * 64 * 128) + 4 * 2 * 128 * 128 + 520 * 128 + 512 * 128
    )
    if llm == "int4":
        assert weights["int8"] == 520 * 128 + 512 * 128


def test_all_layers_takes_embeddings_and_lm_head_to_4_bit(build):
    from manifests.io import read_manifest

    manifest = read_manifest(build("--llm", "int4", "--vision", "fp32", "--all-layers"))
    assert set(manifest.components[1].weights) == {"int4"}


def test_symmetric_int4_has_no_zero_points(build):
    model = ov.Core().read_model(
        build("--llm", "int4", "--vision", "fp32", "--symmetric") / "openvino_language_model.xml"
    )
    types = {str(node.get_element_type()) for node in model.get_ops() if node.get_type_name() == "Constant"}
    assert str(ov.Type.i4) in types
    assert str(ov.Type.u4) not in types


def test_ratio_ranks_the_layers_of_the_whole_component(demo, tmp_path):
    """The layers, and the codes in them, are those of one call of NNCF on the whole graph."""
    whole, streamed = both_ways(demo, Store(tmp_path), ratio=0.6)
    names = int4_names(whole)
    assert int4_names(streamed) == names
    in_blocks = [sum(f"layers.{index}." in name for name in names) for index in range(8)]
    print("layers in 4 bit, block by block:", in_blocks)
    # Not the same share in every block, so the ranking was over all of them.
    assert len({count / total for count, total in zip(in_blocks, [7, 5] * 4, strict=True)}) > 2
    same = [codes(whole[name]) == codes(streamed[name]) for name in names]
    assert sum(item.sum() for item in same) / sum(item.size for item in same) >= 0.99


def test_the_least_sensitive_layers_go_to_4_bit_while_the_share_allows():
    scores = [LayerScore("a", 10, 3.0), LayerScore("b", 20, 1.0), LayerScore("c", 30, 2.0), LayerScore("d", 40, 4.0)]
    assert layers_in_8_bit(scores, 0.6) == {"a", "d"}
    assert layers_in_8_bit(scores, 0.5) == {"a", "c", "d"}  # a share of exactly the ratio is too much, as in NNCF
    assert layers_in_8_bit(scores, 0.01) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("channels", "group", "expected"), [(384, 64, 64), (688, 64, None), (352, 64, 32), (96, 64, 32), (100, -1, -1)]
)
def test_group_size_that_does_not_divide(channels, group, expected):
    assert adjusted_group_size(channels, group) == expected


def test_indivisible_channels_fall_back_visibly(demo, store, tmp_path):
    """An MLP of 344 channels: divisible by 8 only, so its down projection stays in 8 bit; the plan and the manifest say so."""
    import json

    from manifests.io import read_manifest

    odd = shutil.copytree(demo, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 344
    (odd / "config.json").write_text(json.dumps(config))
    tensors = load_file(odd / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("language_model") and "mlp" in name:
            tensors[name] = (tensor[:, :344] if "down_proj" in name else tensor[:344]).contiguous()
    save_file(tensors, odd / "model.safetensors")
    options = ("--llm", "int4-awq", "--vision", "fp32", "--samples", "2", "--no-validate")
    result = vlmconvert("mllama", odd, *options, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 0, result.output
    assert result.output.count("344 channels, not divisible by 64 or any group from 32: int8 per row") == 8
    component = read_manifest(tmp_path / "out").components[1]
    assert len(component.fallbacks) == 8
    assert component.weights["int8"] == 8 * 128 * 344 + 520 * 128 + 512 * 128
