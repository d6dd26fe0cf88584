import numpy as np
import openvino as ov
import pytest
from openvino import opset13

from manifests.errors import ConversionError
from passes.export.ir import count_weights, detach, finish, store_in_half, write
from passes.export.weights import WeightBytes


@pytest.fixture
def graph(tmp_path):
    """A matrix product with a large weight and a small bias."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    x = opset13.parameter([-1, 32], name="x")
    product = opset13.matmul(x, opset13.constant(weight, name="weight"), False, True)
    model = ov.Model([opset13.add(product, opset13.constant(np.ones(64, np.float32)))], [x])
    ov.save_model(model, tmp_path / "graph.xml", compress_to_fp16=False)
    return tmp_path / "graph.xml", weight


def infer(xml, value):
    return ov.Core().compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(value)[0]


def test_detach_and_write_give_the_same_graph(graph, tmp_path):
    xml, _ = graph
    model, weights = detach(xml, lambda name: f"block/{name}")
    assert list(weights) == ["block/weight"]
    assert {port.get_node().get_friendly_name() for port in model.inputs} == {"x", "block/weight"}
    written = tmp_path / "written.xml"
    write(model, weights, written)
    value = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    np.testing.assert_array_equal(infer(written, value), infer(xml, value))
    assert count_weights(written) == {"f32": 64 * 32}


@pytest.mark.parametrize(
    ("stored", "wanted"), [("BF16", "F32"), ("BF16", "F16"), ("F16", "F32"), ("F32", "F16"), ("F32", "F32")]
)
def test_weights_are_converted_on_the_way(tmp_path, stored, wanted):
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    values = torch.randn(64, 32).to(dtypes[stored])
    source = tmp_path / "weights"
    source.write_bytes(b"head" + values.view(torch.uint8).numpy().tobytes())
    weight = opset13.parameter([64, 32], {"F32": ov.Type.f32, "F16": ov.Type.f16}[wanted], name="weight")
    model = ov.Model([opset13.convert(weight, "f32")], [weight])
    place = WeightBytes(source, 4, values.numel() * values.element_size(), stored, wanted)
    write(model, {"weight": place}, tmp_path / "graph.xml")
    result = ov.Core().compile_model(tmp_path / "graph.xml", "CPU")({})[0]
    np.testing.assert_array_equal(result, values.float().to(dtypes[wanted]).float().numpy())


def test_weights_beyond_float16_are_refused(tmp_path):
    source = tmp_path / "weights"
    source.write_bytes(np.full((64, 32), 1e6, np.float32).tobytes())
    weight = opset13.parameter([64, 32], ov.Type.f16, name="weight")
    model = ov.Model([opset13.convert(weight, "f32")], [weight])
    with pytest.raises(ConversionError, match="beyond the range of float16"):
        write(model, {"weight": WeightBytes(source, 0, 64 * 32 * 4, "F32", "F16")}, tmp_path / "graph.xml")


def test_a_lost_weight_is_noticed(graph, tmp_path):
    model, weights = detach(graph[0], lambda name: name)
    with pytest.raises(ConversionError, match="1 weights got lost"):
        write(model, {**weights, "other": next(iter(weights.values()))}, tmp_path / "written.xml")


def test_automatic_names_do_not_depend_on_the_process(graph, tmp_path):
    texts = set()
    for turn in range(2):
        for _ in range(turn):
            opset13.constant(0)  # moves the counter behind automatic names
        x = opset13.parameter([1], name="x")
        path = tmp_path / f"{turn}.xml"
        model = ov.Model([opset13.add(opset13.add(x, x), x)], [x], "model")
        model.outputs[0].set_names({"y"})
        ov.save_model(model, path)
        finish(path)
        texts.add(path.read_text())
    assert len(texts) == 1


def test_constants_are_stored_in_half_and_read_as_they_were(tmp_path):
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    x = opset13.parameter([1, 32], name="x")
    weight = opset13.constant(values, name="layer.weight")
    model = ov.Model([opset13.matmul(x, weight, False, True)], [x])
    store_in_half(model, ["layer.weight"])
    xml = tmp_path / "graph.xml"
    ov.save_model(model, xml, compress_to_fp16=False)
    finish(xml)
    assert count_weights(xml) == {"f16": values.size}
    given = np.ones((1, 32), np.float32)
    expected = given @ values.astype(np.float16).astype(np.float32).T
    np.testing.assert_allclose(infer(xml, given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [(1e6, "layer.weight", "beyond the range of float16"), (1.0, "other.weight", "other.weight must stay float")],
)
def test_what_cannot_be_stored_in_half_is_an_error(value, name, message):
    x = opset13.parameter([1, 4], name="x")
    model = ov.Model([opset13.add(x, opset13.constant(np.full(4, value, np.float32), name="layer.weight"))], [x])
    with pytest.raises(ConversionError, match=message):
        store_in_half(model, [name])
