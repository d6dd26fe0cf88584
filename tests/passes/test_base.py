from dataclasses import dataclass

import pytest

from manifests.errors import BadInputError, ConversionError
from passes.base import PASSES, Form, TransformPass, check_order, named_failure, parse_pass
from passes.compress.int8_ptq import QuantizeInt8PtqPass
from passes.compress.sensitivity import MeasureSensitivityPass
from passes.compress.weights import CompressInt4AwqPass, CompressInt4Pass, CompressInt8Pass
from passes.export.make_stateful import MakeStatefulPass
from passes.export.openvino import ExportOpenvinoPass
from passes.export.slice_lm_head import SliceLmHeadPass
from passes.export.stitch import StitchPass
from passes.graph_pass import Graph, GraphPass
from passes.onnx.stitch import StitchOnnxPass
from passes.onnx.transfer import TransferOnnxPass
from passes.split import SplitPass
from passes.vocabulary import Component


def component(state=False, logits=False):
    return Component(
        name="lm",
        side="language",
        role="",
        kinds={},
        blocks=(),
        inputs=(),
        outputs=(),
        state={"past": "present"} if state else {},
        logits=logits,
    )


FLOAT = (SplitPass(), ExportOpenvinoPass("f32"))
OPENVINO = (Form.GRAPH,)


@pytest.mark.parametrize("name", sorted(PASSES.builtin))
def test_every_pass_round_trips_through_its_line(name):
    item = PASSES.load(name)()
    assert item.name == name
    assert parse_pass(str(item)) == item


def test_line_shows_every_option():
    line = str(CompressInt4AwqPass(group_size=128, symmetric=True))
    assert line == (
        "compress-int4-awq{group_size=128,symmetric=true,ratio=1.0,all_layers=false,scale_estimation=true,data_free=false}"
    )
    assert parse_pass(line) == CompressInt4AwqPass(group_size=128, symmetric=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compress-int5", "there is no pass compress-int5"),
        ("compress-int4{bits=4}", "no option bits: its options are group_size"),
        ("compress-int4{group_size=many}", "group_size=many cannot be used: give a whole number"),
        ("compress-int4{symmetric=yes}", "symmetric=yes cannot be used: give true or false"),
        ("compress-int4{group_size}", "has no value"),
        ("compress-int4{group_size=48}", "power of two"),
        ("compress-int4{ratio=0}", "not a share"),
        ("export-openvino{dtype=f8}", "use f32 or f16"),
        ("quantize-int8-ptq{smooth_quant_alpha=2}", "out of range"),
        ("a b", "is not a pass line"),
    ],
)
def test_bad_lines_are_refused_by_name(line, message):
    with pytest.raises(BadInputError, match=message):
        parse_pass(line)


@pytest.mark.parametrize(
    "steps",
    [
        (*FLOAT, StitchPass()),
        (SplitPass(), ExportOpenvinoPass("f16"), StitchPass()),
        (*FLOAT, CompressInt8Pass(), StitchPass(), MakeStatefulPass(), SliceLmHeadPass()),
        (*FLOAT, MeasureSensitivityPass(64), CompressInt4Pass(ratio=0.5), StitchPass()),
        (*FLOAT, QuantizeInt8PtqPass(), StitchPass()),
    ],
    ids=lambda steps: " ".join(step.name for step in steps),
)
def test_orders_that_hold(steps):
    check_order(component(state=True, logits=True), steps, OPENVINO)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "its passes end with the tensors of a checkpoint"),
        (FLOAT, "its passes end with OpenVINO blocks with float32 weights"),
        ((ExportOpenvinoPass("f32"),), "pass export-openvino cannot come first"),
        ((SplitPass(), StitchPass()), "pass stitch cannot follow split"),
        ((*FLOAT, CompressInt8Pass(), CompressInt4Pass()), "pass compress-int4 cannot follow compress-int8"),
        (
            (SplitPass(), ExportOpenvinoPass("f16"), CompressInt8Pass()),
            "pass compress-int8 cannot follow export-openvino",
        ),
        ((*FLOAT, MakeStatefulPass()), "pass make-stateful cannot follow export-openvino"),
        (
            (*FLOAT, StitchPass(), QuantizeInt8PtqPass()),
            "quantize-int8-ptq cannot follow stitch",
        ),
        ((*FLOAT, TransferOnnxPass()), "pass transfer-onnx cannot follow export-openvino"),
        ((*FLOAT, StitchPass(), StitchOnnxPass()), "pass stitch-onnx cannot follow stitch"),
        (
            (*FLOAT, CompressInt4Pass(ratio=0.5)),
            "compress-int4 needs pass measure-sensitivity{group_size=64} before it",
        ),
        (
            (*FLOAT, MeasureSensitivityPass(32), CompressInt4Pass(ratio=0.5)),
            "needs pass measure-sensitivity{group_size=64}",
        ),
        ((*FLOAT, StitchPass(), MakeStatefulPass(), MakeStatefulPass()), "make-stateful is listed twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_orders_that_do_not_hold_are_refused(steps, message):
    with pytest.raises(BadInputError) as caught:
        check_order(component(state=True, logits=True), steps, OPENVINO)
    assert message in str(caught.value)
    assert "component lm" in str(caught.value)


@pytest.mark.parametrize(
    ("item", "message"), [(MakeStatefulPass(), "no key-value cache"), (SliceLmHeadPass(), "no LM head")]
)
def test_a_pass_refuses_a_component_that_lacks_what_it_works_on(item, message):
    with pytest.raises(BadInputError, match=message):
        check_order(component(), (*FLOAT, StitchPass(), item), OPENVINO)


def test_what_a_pass_needs_is_said_by_the_pass():
    assert QuantizeInt8PtqPass().quantizes_activations
    assert QuantizeInt8PtqPass().needs_activations("head")
    assert CompressInt4AwqPass().needs_activations("layer")
    assert not CompressInt4AwqPass().needs_activations("head")
    assert not CompressInt4AwqPass(data_free=True, scale_estimation=False).needs_activations("layer")
    builtin = [PASSES.load(name) for name in PASSES.builtin]
    assert not any(kind.needs_torch for kind in builtin if issubclass(kind, TransformPass))


@dataclass(frozen=True)
class Fine(GraphPass):
    name = "fine"

    def apply(self, model, graph):
        return model


@dataclass(frozen=True)
class Broken(Fine):
    name = "broken"

    def ensures(self, model, graph):
        raise ConversionError("the promise was not kept")


def test_a_failed_graph_pass_names_pass_component_and_what_ran_before():
    graph = Graph(component(), "key", None, lambda: (None, {}), exact=True, done=("stitch",))
    after = graph.followed_by(Fine()).followed_by(Broken())
    with pytest.raises(
        ConversionError, match=r"pass broken failed on lm \(after stitch, fine\): the promise was not kept"
    ) as caught:
        after.build()
    assert isinstance(caught.value.__cause__, ConversionError)


def test_a_failure_keeps_the_name_of_the_pass_that_it_comes_from():
    expected = pytest.raises(ConversionError, match="^pass fine failed on lm, block layers.0: x$")
    with expected, named_failure(Broken(), "lm"), named_failure(Fine(), "lm", "layers.0"):
        raise ValueError("x")


def test_bad_input_stays_bad_input():
    with pytest.raises(BadInputError, match="^mend it$"), named_failure(Fine(), "lm"):
        raise BadInputError("mend it")
