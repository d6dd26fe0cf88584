"""Layers with a precision of their own: what artifacts hold of them, and that the recipes of artifacts make them again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import openvino as ov
import pytest
import torch
from safetensors import safe_open

import vlmconvert
from manifests.beside import RUN_LOG_NAME
from manifests.io import MANIFEST_NAME, read_manifest
from tests.conftest import exhaustive_but
from tests.conftest import vlmconvert as command
from vlmconvert.families import demo_checkpoint
from vlmconvert.recipes.recipe import recipe_text

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A plain conversion, and one beside it with patterns for layers.

    `expected` says for each component what the patterns mean: regular expressions, of which no two match the same layer.
    """

    family: str
    target: str
    options: Mapping[str, object]
    patterns: Mapping[str, Mapping[str, str]]
    expected: Mapping[str, Mapping[str, str]]


CASES = {
    "openvino-awq": Case(
        "mllama",
        "openvino",
        {"llm": "int4-awq", "ratio": 0.5, "samples": 2, "vision": "int8-ptq", "vision_samples": 2},
        {
            "language_model": {
                "layers.0.*": "fp16",
                "*.down_proj": "int8",
                "layers.[2-3].mlp.up_proj": "fp16",
                "lm_head": "fp16",
            },
            "vision_encoder": {"transformer.layers.?.mlp.fc1": "fp16"},
        },
        {
            "language_model": {
                r"model\.language_model\.layers\.0\.(self_attn\..*|mlp\.(gate|up)_proj)": "fp16",
                r"model\.language_model\.layers\.\d\.mlp\.down_proj": "int8",
                r"model\.language_model\.layers\.[23]\.mlp\.up_proj": "fp16",
                r"lm_head": "fp16",
            },
            "vision_encoder": {r"model\.vision_model\.transformer\.layers\.\d\.mlp\.fc1": "fp16"},
        },
    ),
    "openvino-int8": Case(
        "mllama",
        "openvino",
        {"llm": "int8", "vision": "int8", "logits": "all"},
        {
            "language_model": {"model.language_model.layers.2.*": "fp16"},
            "vision_encoder": {"transformer.layers.0.*": "fp16", "*_embedding.embedding": "fp16"},
        },
        {
            "language_model": {r"model\.language_model\.layers\.2\..*": "fp16"},
            "vision_encoder": {
                r"model\.vision_model\.transformer\.layers\.0\..*": "fp16",
                r"model\.vision_model\.\w+_embedding\.embedding": "fp16",
            },
        },
    ),
    "onnx-awq": Case(
        "llava",
        "onnx",
        {"llm": "int4-awq", "samples": 0, "scale_estimation": False, "group_size": 32, "logits": "all"}
        | {"vision": "int8-ptq", "vision_samples": 2},
        {
            "language_model": {"layers.0.*": "int8", "layers.0.self_attn.*": "fp16", "*.5.mlp.down_proj": "fp16"},
            "text_embeddings": {"*": "fp16"},
            "vision_embeddings": {"encoder.layers.0.*": "fp16"},
        },
        {
            "language_model": {
                r"model\.language_model\.layers\.0\.mlp\..*": "int8",
                r"model\.language_model\.layers\.0\.self_attn\..*": "fp16",
                r"model\.language_model\.layers\.5\.mlp\.down_proj": "fp16",
            },
            "text_embeddings": {r"model\.language_model\.embed_tokens": "fp16"},
            "vision_embeddings": {r"model\.vision_tower\.encoder\.layers\.0\..*": "fp16"},
        },
    ),
}
FROM_AN_EMPTY_STORE = exhaustive_but(["onnx-awq"], ["openvino-awq", "onnx-awq"])


@dataclass(frozen=True)
class Pair:
    """A plain artifact, and one with layers of other precisions."""

    case: Case
    store: Path
    plain: Path
    changed: Path
    recipe: Path

    @property
    def layers(self) -> dict[str, str]:
        """Tensor -> precision, in all components."""
        return {tensor: kind for own in expected(self.case).values() for tensor, kind in own.items()}


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory, store) -> Pair:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    same = {"family": case.family, "store": store, "validate": False, "workers": 1}
    plain = vlmconvert.convert(target=case.target, **case.options, output=folder / "plain", **same)
    components = {
        name: component.model_copy(update={"layers": case.patterns.get(name, {})})
        for name, component in plain.recipe.components.items()
    }
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe_text(plain.recipe.model_copy(update={"components": components})), encoding="utf-8")
    vlmconvert.convert(recipe=recipe, output=folder / "changed", **same)
    return Pair(case, store, folder / "plain", folder / "changed", recipe)


each = pytest.mark.parametrize("pair", exhaustive_but(["onnx-awq"], CASES), indirect=True)


@cache
def layers_of(family: str) -> dict[str, torch.Tensor]:
    """The weights of a demo checkpoint's layers, by their names in memory."""
    with safe_open(demo_checkpoint(family) / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    moved = (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"))
    named = {}
    for name, tensor in tensors.items():
        old, new = next((pair for pair in moved if name.startswith(pair[0])), ("", "model."))
        named[f"{new}{name.removeprefix(old)}"] = tensor
    return {name: tensor for name, tensor in named.items() if tensor.ndim > 1}


def expected(case: Case) -> dict[str, dict[str, str]]:
    """Component -> tensor -> precision; the last layers of llava's vision tower belong to no component."""
    return {
        component: {
            tensor: precision
            for tensor in layers_of(case.family)
            for pattern, precision in patterns.items()
            if re.fullmatch(pattern, tensor.removesuffix(".weight"))
        }
        for component, patterns in case.expected.items()
    }


def constants(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Component and name -> dtype and bytes of what an artifact stores, as its runtime's own library reads it."""
    found = {}
    for component in read_manifest(folder).components:
        graph = next(folder / file.path for file in component.files if file.path.endswith((".xml", ".onnx")))
        if graph.suffix == ".xml":
            nodes = [node for node in ov.Core().read_model(graph).get_ops() if node.get_type_name() == "Constant"]
            stored = {
                node.get_friendly_name(): (node.get_element_type().get_type_name(), node.data.tobytes())
                for node in nodes
            }
        else:
            stored = {
                tensor.name: (onnx.TensorProto.DataType.Name(tensor.data_type), tensor.raw_data)
                for tensor in onnx.load(graph).graph.initializer
            }
        found |= {f"{component.name}:{name}": content for name, content in stored.items()}
    return found


def named(folder: Path, family: str) -> dict[str, tuple[str, bytes]]:
    """Those constants that are called after a tensor, by its name, which may have an ending such as `/scale`."""
    found = {}
    for place, content in constants(folder).items():
        name = place.partition(":")[2]
        if name.partition("/")[0] in layers_of(family):
            found[name] = content
    return found


@each
def test_the_manifest_lists_every_layer(pair):
    for plain, changed in zip(
        read_manifest(pair.plain).components, read_manifest(pair.changed).components, strict=True
    ):
        assert plain.layers == {}
        assert changed.layers == expected(pair.case).get(changed.name, {})
        assert (changed.passes, changed.precision) == (plain.passes, plain.precision)


@each
def test_every_layer_is_stored_as_asked(pair):
    stored = named(pair.changed, pair.case.family)
    assert pair.layers
    for tensor, precision in pair.layers.items():
        # SmoothQuant moves factors between the weights of a float layer and its input.
        weight = layers_of(pair.case.family)[tensor]
        dtype, data = stored[tensor]
        if precision == "fp16":
            assert dtype in {"f16", "FLOAT16"}, tensor
            assert len(data) == 2 * weight.numel(), tensor
            if "vision" not in tensor or pair.case.options["vision"] != "int8-ptq":
                assert data == weight.to(torch.float16).numpy().tobytes(), tensor
        else:
            assert dtype in {"u8", "UINT8"}, tensor
            assert len(data) == weight.numel(), tensor


@each
def test_all_other_layers_are_those_of_the_plain_conversion(pair):
    """Codes, scales and zero points."""
    plain, changed = (named(folder, pair.case.family) for folder in (pair.plain, pair.changed))
    touched = set(pair.layers)
    if (
        pair.case.options["llm"] == "int4-awq"
    ):  # which moves the factors of a down_proj in 4 bit into the up_proj before it
        touched |= {tensor.replace("down_proj", "up_proj") for tensor in touched}
    others = {name for name in plain if name.partition("/")[0] not in touched}
    assert len(others) > 50
    assert {name for name in others if plain[name] != changed.get(name)} == set()


@pytest.mark.exhaustive
@pytest.mark.parametrize("pair", ["openvino-awq"], indirect=True)
def test_all_other_codes_of_a_quantized_graph_are_those_of_the_plain_one(pair):
    """NNCF calls them after nothing, and writes them in the order of the layers."""
    plain, changed = (
        Counter(
            data
            for name, (dtype, data) in constants(folder).items()
            if name.startswith("vision_encoder:") and dtype == "i8"
        )
        for folder in (pair.plain, pair.changed)
    )
    assert changed < plain
    assert plain.total() - changed.total() == len(expected(pair.case)["vision_encoder"])


@each
def test_the_manifest_counts_what_is_stored(pair):
    weights = layers_of(pair.case.family)
    for plain, changed in zip(
        read_manifest(pair.plain).components, read_manifest(pair.changed).components, strict=True
    ):
        own = expected(pair.case).get(changed.name, {})
        assert changed.weights.get("f16", 0) == sum(weights[name].numel() for name in own if own[name] == "fp16")
        if not changed.passes.count("quantize-int8-ptq{smooth_quant_alpha=0.6}"):  # whose factors are weights too
            assert sum(changed.weights.values()) == sum(plain.weights.values())
        if own:
            assert changed.weights != plain.weights


@each
@pytest.mark.usefixtures("elsewhere")
def test_the_plan_lists_every_layer(pair):
    result = command(pair.case.family, "--recipe", pair.recipe, "--store", pair.store, "--dry-run")
    assert result.exit_code == 0, result.output
    said = dict(re.findall(r"^layer (\S+): (\S+)$", result.output, flags=re.MULTILINE))
    assert said == pair.layers


@each
def test_the_artifact_is_whole_and_runs(pair):
    found = vlmconvert.verify(pair.changed)
    assert [item for item in found if item.outcome != "passed"] == []
    assert {"blocks", "run"} <= {item.check for item in found}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RUN_LOG_NAME}


def artifacts_recipe(pair: Pair, folder: Path) -> Path:
    """What `vlmconvert recipe` prints of an artifact, as a file."""
    printed = command("recipe", pair.changed)
    assert printed.exit_code == 0, printed.output
    (folder / "printed.toml").write_text(printed.output, encoding="utf-8")
    return folder / "printed.toml"


@pytest.mark.parametrize("pair", FROM_AN_EMPTY_STORE, indirect=True)
def test_the_recipe_of_an_artifact_gives_the_same_bytes(pair, tmp_path):
    options = ("--recipe", artifacts_recipe(pair, tmp_path), "--no-validate", "--workers", "1")
    result = command(pair.case.family, *options, "-o", tmp_path / "again", "--store", tmp_path / "empty")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "again") == files(pair.changed)


@each
def test_with_the_same_store_nothing_is_made_again(pair, tmp_path):
    options = ("--recipe", artifacts_recipe(pair, tmp_path), "--no-validate", "--store", pair.store)
    result = command(pair.case.family, *options, "-o", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(pair.changed)
    assert result.output.count("found in the store") == len(manifest.components)
    assert (tmp_path / "kept" / MANIFEST_NAME).read_bytes() == (pair.changed / MANIFEST_NAME).read_bytes()
    result = command(pair.case.family, *options, "-o", pair.changed)
    assert result.exit_code == 0, result.output
    assert "already holds this result" in result.output


@each
def test_other_layers_are_another_result(pair):
    options = ("--recipe", pair.recipe, "--no-validate", "--store", pair.store)
    result = command(pair.case.family, *options, "-o", pair.plain, "--dry-run")
    assert result.exit_code == 2
    assert "holds a different result" in result.output
