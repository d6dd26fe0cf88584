from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import openvino as ov
from openvino import opset13

from passes.compat.openvino import AUTOMATIC_NAME, keep_half_precision, make_stateful, set_runtime_option


def cached_sum() -> ov.Model:
    """x [batch, 1, 2] appended to `past` [batch, length, 2], which is what comes out."""
    x, past = opset13.parameter([-1, 1, 2], name="x"), opset13.parameter([-1, -1, 2], name="past")
    for node in (x, past):
        node.output(0).set_names({node.get_friendly_name()})
    present = opset13.result(opset13.concat([past, x], axis=1))
    present.output(0).set_names({"present"})
    total = opset13.result(opset13.reduce_sum(opset13.concat([past, x], axis=1), np.array([1, 2])))
    total.output(0).set_names({"total"})
    return ov.Model([total, present], [x, past], "cached_sum")


def test_state_starts_with_the_given_value_and_is_kept():
    model = cached_sum()
    start = opset13.constant(np.full((1, 1, 2), 10, np.float32))
    try:
        make_stateful(model, {"past": "present"}, {"past": start.output(0)})
    except KeyError as error:
        raise AssertionError(
            f"OpenVINO calls a state variable {error}, no longer after its input and output: no cache could be made"
        ) from error
    model.validate_nodes_and_infer_types()
    assert [port.get_any_name() for port in model.inputs] == ["x"]
    request = ov.Core().compile_model(model, "CPU").create_infer_request()
    totals = [float(request.infer({"x": np.ones((1, 1, 2), np.float32)})["total"][0]) for _ in range(3)]
    assert totals == [22, 24, 26], "the state does not start with the value that it was given, or is not kept"


def test_plugins_take_options_from_the_graph():
    model = cached_sum()
    set_runtime_option(model, "KV_CACHE_PRECISION", "f16")
    set_runtime_option(model, "ACTIVATIONS_SCALE_FACTOR", "8.0")
    core = ov.Core()
    assert core.compile_model(cached_sum(), "CPU").get_property("KV_CACHE_PRECISION") != ov.Type.f16
    compiled = core.compile_model(model, "CPU")
    assert compiled.get_property("KV_CACHE_PRECISION") == ov.Type.f16, (
        "the CPU plugin no longer takes options from a graph's rt_info: artifacts would run with an 8-bit cache"
    )
    chosen = core.compile_model(model, "CPU", {"KV_CACHE_PRECISION": "f32"})
    assert chosen.get_property("KV_CACHE_PRECISION") == ov.Type.f32, "a graph's options now outdo those of the user"


def test_automatic_names_end_in_a_number():
    x = opset13.parameter([1])
    for node in (x, opset13.add(x, x), opset13.shape_of(x), opset13.constant(0.0)):
        assert AUTOMATIC_NAME.match(node.get_friendly_name()), (
            f"OpenVINO calls an operation {node.get_friendly_name()}: equal input would no longer give equal bytes"
        )
    assert AUTOMATIC_NAME.match("layers.0/Multiply_4711")[1] == "layers.0/Multiply"
    assert AUTOMATIC_NAME.match("layers.0/Constant_4711_compressed").groups() == ("layers.0/Constant", "_compressed")
    assert not AUTOMATIC_NAME.match("layers.0.mlp.up_proj")


def test_weights_stay_in_half_precision(tmp_path):
    """The mark is the one that OpenVINO itself writes."""
    x = opset13.parameter([-1, 64], name="x")
    weight = opset13.constant(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16), name="weight")
    product = opset13.matmul(x, opset13.convert(weight, "f32", name="convert"), False, True)
    path = tmp_path / "graph.xml"
    ov.serialize(ov.Model([product], [x]), path)
    tree = ElementTree.parse(path)
    keep_half_precision(tree.find("layers/layer[@name='convert']"))
    tree.write(path)

    def marks(model):
        (node,) = (node for node in model.get_ops() if node.get_type_name() == "Convert")
        return [name for name in node.get_rt_info() if name.startswith("decompression")]

    own = ov.Core().read_model(path)
    weight = opset13.constant(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), name="weight")
    ov.save_model(ov.Model([opset13.matmul(x, weight, False, True)], [x]), tmp_path / "saved.xml")
    assert marks(own), "OpenVINO no longer knows the mark: float16 weights would take twice the memory"
    assert marks(own) == marks(ov.Core().read_model(tmp_path / "saved.xml"))


def test_nothing_reports_home():
    program = """
import sys
from passes.compat.nncf import without_torch
with without_torch():
    import nncf.telemetry.wrapper
    import openvino.tools.ovc.telemetry_utils
assert sys.modules["openvino_telemetry"] is None
assert not isinstance(nncf.telemetry.wrapper.telemetry, nncf.telemetry.wrapper.NNCFTelemetry)
assert openvino.tools.ovc.telemetry_utils.tm.__name__.endswith("stub")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"OpenVINO or NNCF do not fall back to a stub of their telemetry\n{ended.stderr}"
