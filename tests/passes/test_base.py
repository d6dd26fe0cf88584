import pytest

from manifests.errors import BadInputError, ConversionError
from passes.base import _REGISTRY, GraphPass, PassManager, parse_pass, pass_class
from passes.compress.weights import CompressInt4AwqPass


@pytest.mark.parametrize("name", sorted(_REGISTRY))
def test_every_pass_round_trips_through_its_line(name):
    item = pass_class(name)()
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
        ("compress-int4{group_size=many}", "is not a int"),
        ("compress-int4{symmetric=yes}", "is not a bool"),
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


def test_a_failed_graph_pass_names_pass_component_and_what_ran_before():
    class Fine(GraphPass):
        name = "fine"

        def apply(self, model):
            return model

    class Broken(Fine):
        name = "broken"

        def ensures(self, model):
            raise ConversionError("the promise was not kept")

    with pytest.raises(
        ConversionError, match=r"pass broken failed on lm \(after fine\): the promise was not kept"
    ) as caught:
        PassManager("lm", (Fine(), Broken()))(None)
    assert isinstance(caught.value.__cause__, ConversionError)
