"""Blocks find their tensors by the modules that hold them; kinds have names of their own."""

from __future__ import annotations

import pytest

from manifests.errors import ConversionError
from manifests.model import Port
from passes.export.names import block_names, block_prefixes
from passes.vocabulary import Block, Component, Kind, kinds_by_name, kinds_of


def block(weights: dict[str, str], name: str = "layers.1") -> Block:
    return Block(name, "layer", weights, {}, {})


def component(name: str, *kinds: Kind, blocks: tuple[Block, ...] = ()) -> Component:
    return Component(name, "language", name, kinds_by_name(*kinds), blocks, (), ())


def kind(name: str, module: str = "package.module:function") -> Kind:
    return Kind(name, module, (Port(name="x", dtype="f32", shape=["batch", 4]),), (), {"batch": 2})


@pytest.mark.parametrize(
    ("weights", "parameter", "tensor"),
    [
        ({"": "model.layers.1"}, "mlp.weight", "model.layers.1.mlp.weight"),
        ({"layer": "model.layers.1"}, "layer.mlp.weight", "model.layers.1.mlp.weight"),
        ({"": "model.norm", "lm_head": "lm_head"}, "lm_head.weight", "lm_head.weight"),
        ({"gate": "model.layers.1.gate"}, "gate", "model.layers.1.gate"),
        ({"lm_head.weight": "model.embed_tokens.weight"}, "lm_head.weight", "model.embed_tokens.weight"),
        ({"a": "model.one", "a.b": "model.other"}, "a.b.weight", "model.other.weight"),
    ],
)
def test_a_parameter_is_found_by_the_longest_path(weights, parameter, tensor):
    parameters = [parameter, *(f"{path}.other".lstrip(".") for path in weights if path != parameter)]
    assert block(weights).bound(parameters).tensors[parameter] == tensor


def test_tensors_are_in_the_order_of_the_parameters():
    bound = block({"b": "model.b", "": "model"}).bound(["z", "b.weight", "a"])
    assert list(bound.tensors.items()) == [("z", "model.z"), ("b.weight", "model.b.weight"), ("a", "model.a")]


def test_a_parameter_that_no_path_holds_is_named():
    with pytest.raises(
        ConversionError, match=r"block layers\.1 names no tensor for parameter norm\.bias of its kind layer"
    ):
        block({"layer": "model.layers.1", "norm.weight": "model.norm.weight"}).bound(
            ["layer.weight", "norm.weight", "norm.bias"]
        )


def test_a_path_ends_at_a_dot():
    with pytest.raises(ConversionError, match=r"parameter layers\.weight"):
        block({"layer": "model.layers.1"}).bound(["layer.weight", "layers.weight"])


def test_a_path_that_holds_no_parameter_is_named():
    with pytest.raises(ConversionError, match='names tensors model.pre_norm for the path "pre_norm" of its kind layer'):
        block({"": "model.layers.1", "pre_norm": "model.pre_norm"}).bound(["weight"])


def test_a_component_is_bound_by_its_kinds():
    part = component("part", kind("layer"), blocks=(block({"": "model.layers.1"}), block({"": "model.2"}, "layers.2")))
    assert part.tensor_names() == set()
    bound = part.bound({"layer": {"weight": (3, 4), "bias": (4,)}})
    assert bound.tensor_names() == {
        f"{name}.{part}" for name in ("model.layers.1", "model.2") for part in ("weight", "bias")
    }
    assert [block.weights for block in bound.blocks] == [block.weights for block in part.blocks]


def test_names_in_a_graph_need_no_parameters():
    unbound = block({"norm": "model.norm", "lm_head.weight": "model.embed_tokens.weight"})
    assert block_prefixes(unbound) == ("layers.1/", "model.norm", "model.embed_tokens")
    rename = block_names(unbound.bound(["norm.weight", "lm_head.weight"]))
    assert rename("model.norm.weight") == "model.norm.weight"
    assert rename("model.embed_tokens") == "model.embed_tokens"
    assert rename("Add_3") == "layers.1/Add_3"


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(ConversionError, match=r"two kinds of block are called layer \(package.a:f, and package.b:f\)"):
        kinds_by_name(kind("layer", "package.a:f"), kind("layer", "package.b:f"))
    parts = component("encoder", kind("layer", "package.a:f")), component("decoder", kind("layer", "package.b:f"))
    with pytest.raises(ConversionError, match=r"package.a:f in the encoder, and package.b:f in the decoder"):
        kinds_of(parts)


def test_components_may_share_a_kind():
    one, other = component("encoder", kind("layer")), component("decoder", kind("layer"), kind("head"))
    assert kinds_of((one, other)) == {"layer": kind("layer"), "head": kind("head")}
