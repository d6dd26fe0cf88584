"""The table of precisions: each row holds together, and everything that is offered follows from it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import click
import pytest

from manifests.errors import BadInputError
from passes.base import PASSES, TransformPass, parse_pass
from vlmconvert.commands.cli import main
from vlmconvert.precisions import (
    PRECISIONS,
    Precision,
    find_precision,
    load_precision,
    max_kl,
    precision_names,
    precision_options,
)
from vlmconvert.targets import TARGETS, load_target

ROWS = [load_precision(name) for name in PRECISIONS.builtin]


@pytest.fixture
def add(monkeypatch):
    """Add a row as a package would, for one test."""

    def row(precision: Precision) -> None:
        monkeypatch.setitem(PRECISIONS.builtin, precision.name, precision)

    yield row
    load_precision.cache_clear()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_holds_together(row):
    assert row.sides
    assert set(row.targets) <= set(TARGETS.builtin)
    kinds = [PASSES.load(name) for name in row.steps]
    assert all(issubclass(kind, TransformPass) for kind in kinds)
    known = {field.name: field.type for kind in kinds for field in fields(kind)}
    for option in row.options:
        assert known[option.name] == option.kind.__name__
    assert all(item.name in PASSES for item in row.passes({}))


def test_names_by_side_and_target():
    assert precision_names("vision", "onnx") == ("fp32", "fp16", "int8", "int8-ptq")
    assert precision_names("language", "onnx") == ("fp32", "fp16", "int8", "int4", "int4-awq", "int4-gptq")
    assert precision_names("language", "ascend") == ("w8a16",)
    assert precision_names("vision", "ascend") == ()
    assert set(precision_names("language")) | set(precision_names("vision")) == {row.name for row in ROWS}


def test_the_command_line_offers_what_the_table_has():
    command = main.get_command(click.Context(main), "convert")
    parameters = {item.name: item for item in command.get_params(click.Context(command))}
    assert parameters["llm"].type.choices == precision_names("language")
    assert parameters["vision"].type.choices == precision_names("vision")
    names = [option.name for option in precision_options()]
    assert len(set(names)) == len(names)
    assert set(names) <= parameters.keys()


@pytest.mark.parametrize("target", TARGETS.builtin)
def test_what_a_target_gives_by_default_is_for_it(target):
    for side, name in load_target(target).precisions.items():
        assert name in precision_names(side, target)


def test_passes_get_the_options_that_are_theirs():
    values = {"group_size": 128, "symmetric": None, "smooth_quant_alpha": 0.2}
    (item,) = load_precision("int4").passes(values)
    assert str(item) == "compress-int4{group_size=128,symmetric=false,ratio=1.0,all_layers=false}"
    (item,) = load_precision("int8-ptq").passes(values)
    assert str(item) == "quantize-int8-ptq{smooth_quant_alpha=0.2}"
    assert load_precision("fp16").passes(values) == ()
    with pytest.raises(BadInputError, match="48"):
        load_precision("int4").passes({"group_size": 48})


def test_a_pass_follows_what_it_needs_which_runs_once():
    items = load_precision("int4-awq").passes({"ratio": 0.5, "group_size": 32})
    assert [str(item) for item in items] == [
        "measure-sensitivity{group_size=32}",
        "compress-int4-awq{group_size=32,symmetric=false,ratio=0.5,all_layers=false,scale_estimation=true,data_free=false}",
    ]
    twice = Precision("twice", ("language",), ("openvino",), steps=("compress-int4", "compress-int4-awq"))
    names = [item.name for item in twice.passes({"ratio": 0.5})]
    assert names == ["measure-sensitivity", "compress-int4", "compress-int4-awq"]


@pytest.mark.parametrize(
    ("lines", "precision"),
    [
        (["split", "export-openvino{dtype=f32}", "stitch"], "fp32"),
        (["split", "export-openvino{dtype=f16}", "stitch"], "fp16"),
        (["split", "export-openvino{dtype=f32}", "compress-int8", "stitch"], "int8"),
        (["split", "export-openvino{dtype=f32}", "measure-sensitivity", "compress-int4{ratio=0.5}", "stitch"], "int4"),
        (["split", "export-openvino{dtype=f32}", "quantize-int8-ptq", "stitch"], "int8-ptq"),
        (["split", "export-openvino{dtype=f16}", "quantize-int8-ptq", "stitch"], "custom"),
        (["split", "export-openvino{dtype=f32}", "compress-int4", "quantize-int8-ptq", "stitch"], "custom"),
        (["compress-w8a16"], "custom"),  # which is no precision for OpenVINO
    ],
)
def test_the_name_of_passes(lines, precision):
    assert find_precision([parse_pass(line) for line in lines], "openvino") == precision


def test_a_precision_of_a_package_is_offered_like_the_others(add):
    add(Precision("halves", ("language",), ("openvino",), export="f16"))
    assert "halves" in precision_names("language")
    assert "halves" not in precision_names("language", "onnx")
    assert "halves" not in precision_names("vision")
    assert load_precision("halves").bits == 16


def test_the_documented_table_is_the_table():
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    rows = text[text.index("| precision | side | targets | bits |") :].split("\n\n")[0].splitlines()[2:]
    written = {}
    for row in rows:
        name, sides, targets, bits, _meaning = (cell.strip().replace("`", "") for cell in row.strip("|").split("|"))
        written[name] = (tuple(sides.split(", ")), tuple(targets.split(", ")), int(bits))
    rows_of_code = {name: load_precision(name) for name in PRECISIONS.builtin}
    assert written == {name: (row.sides, row.targets, row.bits) for name, row in rows_of_code.items()}


def test_a_limit_is_what_both_sides_may_lose():
    known = {row.name: row.max_kl for row in map(load_precision, PRECISIONS.names)}
    assert max_kl(["int8", "int4-awq"], ["int8-ptq"]) == known["int4-awq"] + known["int8-ptq"]
    assert max_kl(["w8a16"], []) == known["w8a16"]
    assert max_kl(["custom"], ["fp32"]) == 1.0 + known["fp32"]
    assert known["fp32"] < known["fp16"] < known["int8"] < known["int4-gptq"] < known["int4-awq"] < known["int4"]
