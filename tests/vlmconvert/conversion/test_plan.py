"""Recipes that cannot be: refused by the command line before any work, with one sentence and exit code 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from tests.conftest import vlmconvert

FLOAT, HALF = "export-openvino{dtype=f32}", "export-openvino{dtype=f16}"
# A recipe of the llava demo for each target; tests change one thing.
OPENVINO = {
    "vision_embeddings": ["split", FLOAT, "compress-int8", "stitch"],
    "text_embeddings": ["split", HALF, "stitch"],
    "language_model": ["split", FLOAT, "compress-int4{group_size=32}", "stitch", "make-stateful", "slice-lm-head"],
}
ONNX = {
    "vision_embeddings": ["split", FLOAT, "quantize-int8-ptq", "transfer-onnx", "stitch-onnx"],
    "text_embeddings": ["split", "export-onnx{dtype=f16}", "stitch-onnx"],
    "language_model": ["split", FLOAT, "compress-int8", "transfer-onnx", "stitch-onnx", "slice-lm-head-onnx"],
}
ASCEND = {"model": ["compress-w8a16"]}
GOOD = {"openvino": OPENVINO, "onnx": ONNX, "ascend": ASCEND}
LANGUAGE = "language_model"


def content(target: str = "openvino", passes: Mapping[str, Sequence[str]] | None = None, **more: Any) -> dict[str, Any]:
    """A recipe as the tables of its file: the good one with other passes for some components, and other tables."""
    components = {name: {"passes": list(lines)} for name, lines in {**GOOD[target], **(passes or {})}.items()}
    return {"target": target, "components": components, **more}


def with_layers(component: str, layers: Mapping[str, Any], target: str = "openvino", **more: Any) -> dict[str, Any]:
    made = content(target, **more)
    made["components"][component]["layers"] = layers
    return made


def without(place: str) -> dict[str, Any]:
    """A recipe that lacks a key or a table."""
    made = content()
    *tables, key = place.split(".")
    table = made
    for name in tables:
        table = table[name]
    del table[key]
    return made


def with_key(place: str, value: Any, target: str = "openvino") -> dict[str, Any]:
    """A recipe in which one key has another value."""
    made = content(target)
    *tables, key = place.split(".")
    table = made
    for name in tables:
        table = table.setdefault(name, {})
    table[key] = value
    return made


@pytest.fixture
def run(store, tmp_path):
    """Run a recipe, given as tables or as text, on a demo; nothing is written but what the store has of the architecture."""

    def command(recipe: Mapping[str, Any] | str, *options: str | Path, family: str = "llava"):
        file = tmp_path / "recipe.toml"
        file.write_text(recipe if isinstance(recipe, str) else tomlkit.dumps(recipe), encoding="utf-8")
        result = vlmconvert(family, "--recipe", file, *options, "-o", tmp_path / "out", "--store", store)
        assert not (tmp_path / "out").exists()
        return result

    return command


def assert_refused(result, *fragments: str) -> None:
    """One sentence with these fragments, exit code 2, and no plan."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if not line.startswith("reading the architecture")]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("vlmconvert: ")
    assert lines[0].count(": ") >= 2, f"no mend in {lines[0]}"
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.mark.parametrize("target", GOOD)
def test_the_recipes_that_the_tests_change_are_good(target, run):
    result = run(content(target), "--dry-run")
    assert result.exit_code == 0, result.output
    for line in ("compress-int8{symmetric=false}",) if target != "ascend" else ("compress-w8a16{group_size=0,",):
        assert line in result.output  # with the options that the recipe leaves out


@pytest.mark.parametrize(
    ("recipe", "fragments"),
    [
        (with_key("target", "coreml"), ("no target coreml", "openvino")),
        (content(passes={LANGUAGE: ["split", "sparsify"]}), (f"component {LANGUAGE}", "no pass sparsify", "stitch")),
        (
            content(passes={LANGUAGE: ["split", FLOAT, "compress-int4{bits=3}"]}),
            (f"component {LANGUAGE}", "compress-int4 has no option bits", "group_size"),
        ),
        (content(passes={LANGUAGE: ["split{a=1}"]}), ("pass split has no option a",)),
        (
            content(passes={LANGUAGE: ["split", FLOAT, "compress-int4{group_size=48}"]}),
            (f"component {LANGUAGE}", "48", "power of two"),
        ),
        (content(passes={LANGUAGE: ["split", FLOAT, "compress-int4{ratio=nan}"]}), ("ratio nan", "up to 1")),
        (content(passes={LANGUAGE: ["split", "export-openvino{dtype=f8}"]}), ("dtype=f8", "f32 or f16")),
        (content(passes={LANGUAGE: ["split", FLOAT, "compress-int4{symmetric=yes}"]}), ("symmetric=yes", "true or false")),
        (content(passes={LANGUAGE: ["split now"]}), (f"component {LANGUAGE}", "'split now'", "name{option=value,...}")),
        (content(passes={LANGUAGE: ["split{a}"]}), ("'a' has no value",)),
        (content(passes={"lm": ["split"]}), ("a component lm", "llava", LANGUAGE)),
        (without(f"components.{LANGUAGE}"), (f"no component {LANGUAGE}", f"[components.{LANGUAGE}]")),
        (with_key("options", {"shard_size": "1GB"}), ("openvino has no option shard_size",)),
        (with_key("options", {"logits": "all"}), ("openvino has no option logits",)),
        (with_key("options.shard_size", "much", "ascend"), ("--shard-size much", "4GB")),
        (with_key("options.shard_size", [1], "ascend"), ("--shard-size [1]", "4GB")),
        (with_key("options.shard_size", 0, "ascend"), ("--shard-size 0", "too small")),
        (with_key("options.engine", "other", "ascend"), ("--engine other", "msmodelslim")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_names_and_values_that_there_are_not(recipe, fragments, run):
    assert_refused(run(recipe), *fragments)


@pytest.mark.parametrize(
    ("layers", "fragments"),
    [
        ({"layers.99.*": "int8"}, ("no layer", "'layers.99.*'", "model.language_model.layers.0.self_attn.q_proj")),
        ({"layers.0.*": "int8", "decoder.*": "int8"}, ("no layer", "'decoder.*'")),
        ({"": "int8"}, ("no layer", "''")),
        ({"layers.0.input_layernorm": "int8"}, ("no layer",)),  # a vector
        ({"ayers.0.mlp.up_proj": "int8"}, ("no layer",)),
        ({"layers.0.*": "int3"}, ("'layers.0.*'", "int3", "fp16 or int8")),
        ({"layers.0.*": "int4"}, ("'layers.0.*'", "int4", "fp16 or int8")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_layers_that_there_are_not(layers, fragments, run):
    assert_refused(run(with_layers(LANGUAGE, layers)), f"component {LANGUAGE}", *fragments)


@pytest.mark.parametrize(
    ("component", "precision", "target", "fragments"),
    [
        ("vision_embeddings", "int8", "openvino", ("int8", "use fp16")),  # what the component has anyway
        ("text_embeddings", "int8", "openvino", ("int8", "compresses")),  # in which nothing is compressed
        ("vision_embeddings", "int8", "onnx", ("int8", "use fp16")),
        ("model", "fp16", "ascend", ("fp16", "leave")),
    ],
)
def test_precisions_that_no_pass_of_a_component_gives_to_layers(component, precision, target, fragments, run):
    assert_refused(run(with_layers(component, {"*": precision}, target)), f"component {component}", *fragments)


@pytest.mark.parametrize(
    ("target", "component", "lines", "fragments"),
    [
        ("openvino", LANGUAGE, [FLOAT, "stitch"], ("export-openvino", "first", "blocks of a checkpoint")),
        ("openvino", LANGUAGE, ["stitch"], ("stitch", "first")),
        ("openvino", LANGUAGE, ["split", "split"], ("split", "twice")),
        ("openvino", LANGUAGE, ["split", "stitch"], ("stitch cannot follow split",)),
        ("openvino", LANGUAGE, ["split", "compress-int4"], ("compress-int4 cannot follow split", "float32 weights")),
        ("openvino", LANGUAGE, ["split", HALF, "compress-int4"], ("compress-int4 cannot follow export-openvino",)),
        ("openvino", LANGUAGE, ["split", FLOAT, "make-stateful"], ("make-stateful cannot follow export-openvino",)),
        ("openvino", LANGUAGE, ["split", FLOAT, "stitch", "compress-int4"], ("compress-int4 cannot follow stitch",)),
        ("openvino", LANGUAGE, ["split", FLOAT, "compress-int8", "compress-int4"], ("cannot follow compress-int8",)),
        ("openvino", LANGUAGE, ["split", FLOAT, "compress-int8", "compress-int8"], ("compress-int8", "twice")),
        ("openvino", LANGUAGE, ["split", FLOAT, "compress-int8", "quantize-int8-ptq"], ("cannot follow compress-int8",)),
        ("openvino", LANGUAGE, ["split", FLOAT, "stitch", "stitch"], ("stitch", "twice")),
        ("openvino", LANGUAGE, [*OPENVINO[LANGUAGE], "make-stateful"], ("make-stateful", "twice")),
        ("openvino", LANGUAGE, [*OPENVINO[LANGUAGE], "slice-lm-head"], ("slice-lm-head", "twice")),
        (
            "openvino",
            LANGUAGE,
            ["split", FLOAT, "stitch", "quantize-int8-ptq"],
            ("quantize-int8-ptq cannot follow stitch", "OpenVINO blocks with float32 weights"),
        ),
        ("openvino", LANGUAGE, ["split", FLOAT, "stitch", "slice-lm-head"], ("key-value cache", "make-stateful")),
        ("openvino", LANGUAGE, ["split"], ("end with the blocks of a checkpoint", "add")),
        ("openvino", LANGUAGE, ["split", FLOAT, "compress-int4"], ("end with compressed OpenVINO blocks", "add")),
        ("openvino", LANGUAGE, ONNX[LANGUAGE], ("end with an ONNX graph",)),
        ("openvino", "text_embeddings", ["split", HALF, "stitch", "make-stateful"], ("no key-value cache", "make-stateful")),
        ("openvino", "text_embeddings", ["split", HALF, "stitch", "slice-lm-head"], ("no LM head", "slice-lm-head")),
        ("openvino", LANGUAGE, ["compress-w8a16"], ("end with finished tensors",)),
        (
            "openvino",
            LANGUAGE,
            ["split", FLOAT, "compress-int4{ratio=0.5}", "stitch"],
            ("compress-int4 needs", "measure-sensitivity{group_size=64}"),
        ),
        (
            "openvino",
            LANGUAGE,
            ["split", FLOAT, "measure-sensitivity{group_size=64}", "compress-int4-awq{group_size=32,ratio=0.5}"],
            ("compress-int4-awq needs", "measure-sensitivity{group_size=32}"),
        ),
        ("openvino", LANGUAGE, [*OPENVINO[LANGUAGE], "validate-parity"], ("validate-parity", "finished artifacts")),
        ("openvino", LANGUAGE, ["validate-blocks"], ("validate-blocks", "finished artifacts")),
        ("onnx", LANGUAGE, OPENVINO[LANGUAGE], ("end with an OpenVINO graph", "an ONNX graph")),
        ("onnx", LANGUAGE, ["split", "export-onnx", "compress-int8"], ("compress-int8 cannot follow export-onnx",)),
        ("onnx", LANGUAGE, ["split", "export-onnx", "transfer-onnx"], ("transfer-onnx cannot follow export-onnx",)),
        ("onnx", LANGUAGE, ["split", FLOAT, "transfer-onnx"], ("transfer-onnx cannot follow export-openvino", "compressed")),
        ("onnx", LANGUAGE, ["split", FLOAT, "stitch", "transfer-onnx"], ("transfer-onnx cannot follow stitch",)),
        ("onnx", LANGUAGE, ["split", FLOAT, "stitch", "stitch-onnx"], ("stitch-onnx cannot follow stitch",)),
        ("onnx", LANGUAGE, ["split", "export-onnx", "stitch-onnx", "slice-lm-head"], ("slice-lm-head cannot follow",)),
        ("onnx", LANGUAGE, [*ONNX[LANGUAGE], "slice-lm-head-onnx"], ("slice-lm-head-onnx", "twice")),
        (
            "onnx",
            "text_embeddings",
            ["split", "export-onnx", "stitch-onnx", "slice-lm-head-onnx"],
            ("no LM head", "slice-lm-head-onnx"),
        ),
        ("ascend", "model", ["split"], ("end with the blocks of a checkpoint", "finished tensors")),
        ("ascend", "model", ["split", "compress-w8a16"], ("compress-w8a16 cannot follow split", "first")),
        ("ascend", "model", ["compress-w8a16", "compress-w8a16"], ("compress-w8a16", "twice")),
        ("ascend", "model", ["compress-w8a16", "stitch"], ("stitch cannot follow compress-w8a16",)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_orders_that_do_not_hold(target, component, lines, fragments, run):
    assert_refused(run(content(target, {component: lines})), f"component {component}", *fragments)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("target = openvino", ("recipe.toml", "TOML")),
        ("", ("recipe.toml", "target is missing")),
        ("target = 'openvino'", ("components is missing",)),
        (content() | {"components": {}}, ("components is empty",)),
        (content() | {"tragets": 1}, ("tragets is unknown",)),
        (content(passes={LANGUAGE: []}), (f"components.{LANGUAGE}.passes is empty",)),
        (with_key(f"components.{LANGUAGE}.pases", []), (f"components.{LANGUAGE}.pases is unknown",)),
        (without(f"components.{LANGUAGE}.passes"), (f"components.{LANGUAGE}.passes is missing",)),
        (with_key(f"components.{LANGUAGE}.passes", "split"), (f"components.{LANGUAGE}.passes", "list")),
        (with_key(f"components.{LANGUAGE}.passes", [1]), (f"components.{LANGUAGE}.passes.0", "string")),
        (with_layers(LANGUAGE, {"layers.0.*": 8}), (f"components.{LANGUAGE}.layers.layers.0.*", "string")),
        (with_key("calibration.sample", 3), ("calibration.sample is unknown",)),
        (with_key("calibration.samples", "many"), ("calibration.samples", "integer")),
        (with_key("calibration.samples", -1), ("calibration.samples", "greater than or equal to 0")),
        (with_key("calibration.vision_samples", 0), ("calibration.vision_samples", "greater than or equal to 1")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_files_that_are_no_recipes(text, fragments, run):
    assert_refused(run(text), *fragments)


def test_a_file_that_is_not_text(run, tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    result = vlmconvert("llava", "--recipe", tmp_path / "binary.toml")
    assert_refused(result, "binary.toml", "TOML")


@pytest.mark.parametrize("option", ["--llm", "--vision", "--target", "--samples", "--seed", "--group-size", "--logits"])
def test_options_that_a_recipe_says(option, run):
    values = {"--llm": "int4", "--vision": "int8", "--target": "openvino", "--logits": "all"}
    assert_refused(run(content(), option, values.get(option, "8")), f"{option} does not go with --recipe")


def test_options_of_other_targets_are_no_exception(run):
    assert_refused(run(content(), "--shard-size", "1GB"), "--shard-size does not go with --recipe")
    assert_refused(run(content("ascend"), "--shard-size", "1GB"), "--shard-size does not go with --recipe")


@pytest.mark.parametrize("target", GOOD)
def test_a_recipe_of_one_model_run_on_another(target, run):
    result = run(content(target), "--dry-run", family="mllama")
    if target == "ascend":  # which has one component for every model
        assert result.exit_code == 0, result.output
    else:
        assert_refused(result, "mllama models", "text_embeddings" if target == "openvino" else "", LANGUAGE)


@pytest.mark.parametrize("lines", [["compress-int4-awq"], ["measure-sensitivity", "compress-int4{ratio=0.5}"]])
def test_passes_that_need_samples_where_there_are_none(lines, run):
    passes = {LANGUAGE: ["split", FLOAT, *lines, "stitch", "make-stateful"]}
    result = run(content(passes=passes, calibration={"samples": 0}))
    assert_refused(result, f"component {LANGUAGE}", lines[0], "[calibration]")


@pytest.mark.parametrize(
    ("vision", "precision"),
    [
        (["split", FLOAT, "compress-int4{group_size=32}", "stitch"], "int4"),
        (["split", FLOAT, "quantize-int8-ptq", "stitch"], "int8-ptq"),
    ],
)
def test_the_plan_names_the_precision_of_passes_that_options_do_not_give(vision, precision, run):
    passes = {"vision_embeddings": vision, LANGUAGE: ["split", FLOAT, "stitch", "slice-lm-head", "make-stateful"]}
    result = run(content(passes=passes), "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"│ vision_embeddings │ {precision} " in result.output
    assert f"│ {LANGUAGE}    │ fp32 " in result.output
