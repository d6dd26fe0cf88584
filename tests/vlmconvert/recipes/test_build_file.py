"""Build files: what their variants are, what is refused, and that variants share what is made."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import vlmconvert
from manifests.errors import BadInputError, CheckFailedError, ConversionError
from manifests.io import MANIFEST_NAME, read_manifest
from manifests.model import Manifest, Source, Validation
from tests.conftest import vlmconvert as command
from vlmconvert.conversion.convert import Converted
from vlmconvert.families import demo_checkpoint
from vlmconvert.recipes.build_file import read_build_file
from vlmconvert.recipes.recipe import Recipe

pytestmark = pytest.mark.slow

ARGUMENTS = {name: item.default for name, item in inspect.signature(vlmconvert.convert).parameters.items()}
RECIPE = """target = "openvino"
[components.vision_encoder]
passes = ["split", "export-openvino{dtype=f32}", "compress-int8", "stitch"]
[components.language_model]
passes = ["split", "export-openvino{dtype=f16}", "stitch", "make-stateful"]
"""


@pytest.fixture
def read(tmp_path):
    """The variants of a file: name -> arguments."""

    def variants(text: str) -> dict[str, dict]:
        (tmp_path / "variants.toml").write_text(text, encoding="utf-8")
        return {item.name: dict(item.arguments) for item in read_build_file(tmp_path / "variants.toml", ARGUMENTS)}

    return variants


def test_a_variant_has_the_defaults_and_what_it_says_itself(read):
    text = 'family = "llava"\nvision = "int8"\nsamples = 8\nmax_kl = 2\n[variants.a]\n[variants.b]\nsamples = 4\nllm = "fp16"\n'
    defaults = {"family": "llava", "vision": "int8", "samples": 8, "max_kl": 2}
    assert read(text) == {"a": defaults, "b": defaults | {"samples": 4, "llm": "fp16"}}


def test_the_order_is_that_of_the_file(read):
    assert list(read("[variants.z]\n[variants.a]\n[variants.k]\n")) == ["z", "a", "k"]


def test_a_default_that_a_target_has_no_use_for_is_left_out(read):
    text = """
vision = "int8-ptq"
llm = "int4"
group_size = 64
logits = "all"
shard_size = "1GB"
allow_nonfinite = true
[variants.openvino]
[variants.onnx]
target = "onnx"
[variants.ascend]
target = "ascend"
"""
    graph = {"vision": "int8-ptq", "llm": "int4", "group_size": 64, "logits": "all"}
    assert read(text) == {
        "openvino": graph,
        "onnx": {"target": "onnx", **graph},
        "ascend": {"target": "ascend", "group_size": 64, "shard_size": "1GB", "allow_nonfinite": True},
    }


def test_what_a_variant_says_itself_is_never_left_out(read):
    assert read('[variants.a]\ntarget = "ascend"\nvision = "int8"\nlogits = "all"\n') == {
        "a": {"target": "ascend", "vision": "int8", "logits": "all"}
    }


def test_a_recipe_replaces_the_defaults_that_it_says(read, tmp_path):
    text = """
target = "onnx"
llm = "int8"
group_size = 32
samples = 8
calibration = "scenes"
max_kl = 0.5
validate = false
[variants.options]
[variants.recipe]
recipe = "recipe.toml"
max_kl = 1.5
"""
    made = read(text)
    assert made["options"].keys() == {
        "target",
        "llm",
        "group_size",
        "samples",
        "calibration",
        "max_kl",
        "validate",
    }
    assert made["recipe"] == {"recipe": str(tmp_path / "recipe.toml"), "max_kl": 1.5, "validate": False}


def test_paths_are_meant_from_the_folder_of_the_file(read, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "scenes").mkdir()
    text = 'checkpoint = "checkpoint"\ncalibration = "photos"\n[variants.a]\n[variants.b]\ncalibration = "scenes"\n'
    made = read(text)
    assert made["a"] == {"checkpoint": str(tmp_path / "checkpoint"), "calibration": str(tmp_path / "photos")}
    assert made["b"]["calibration"] == "scenes"  # which is no path
    assert read('checkpoint = "org/name"\n[variants.a]\n') == {"a": {"checkpoint": "org/name"}}
    assert read('checkpoint = "/data/model"\n[variants.a]\n') == {"a": {"checkpoint": "/data/model"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no variants: add a table such as"),
        ("llm = 'int4'", "has no variants"),
        ("[variants]", "has no variants"),
        ("variants = 3", "has no variants"),
        ("[variants]\na = 3", r"variants\.a is not a table: write it as \[variants\.a\]"),
        ("variants = [1", "cannot be read as TOML"),
        ("[variants.a]\nlm = 'int4'", r"variants\.a has an unknown key lm: use options"),
        ("lm = 'int4'\n[variants.a]", r"variants\.toml has an unknown key lm"),
        ("group-size = 64\n[variants.a]", "unknown key group-size: use .* with underscores"),
        ("reporter = 'x'\n[variants.a]", "unknown key reporter"),
        ("save_recipe = 'x'\n[variants.a]", "unknown key save_recipe"),
        ("options = {}\n[variants.a]", "unknown key options"),
        ("output = 'x'\n[variants.a]", "key output, .*--output to vlmconvert build"),
        ("[variants.a]\nstore = 'x'", "key store, .*--store to vlmconvert build"),
        ("[variants.a]\ndry_run = true", "key dry_run, .*--dry-run to vlmconvert build"),
        ("[variants.a]\ntoken = 'x'", "key token, .*--token to vlmconvert build"),
        ("llm = 'int3'\n[variants.a]", "variants.toml: llm cannot be int3: use fp32, fp16"),
        ("[variants.a]\nvision = 'int4'", r"variants\.a: vision cannot be int4: use fp32"),
        ("target = 'coreml'\n[variants.a]", "there is no target coreml: use openvino"),
        ("[variants.a]\ntarget = 3", "--target 3 cannot be used: give a text"),
        ("llm = ['int4']\n[variants.a]", "--llm .* cannot be used: give a text"),
        ("checkpoint = 3\n[variants.a]", "--checkpoint 3 cannot be used: give a text"),
        ("[variants.a]\nsamples = '8'", "--samples '8' cannot be used: give a whole number"),
        ("samples = true\n[variants.a]", "--samples True cannot be used: give a whole number"),
        ("seed = 2026-01-01\n[variants.a]", "--seed .* cannot be used: give a whole number"),
        ("max_kl = 'low'\n[variants.a]", "--max-kl 'low' cannot be used: give a number"),
        ("validate = 'no'\n[variants.a]", "--validate 'no' cannot be used: give true or false"),
        ("[variants.a]\ngroup_size = 64.0", "--group-size 64.0 cannot be used: give a whole number"),
        ("shard_size = 'big'\n[variants.a]", "--shard-size big is not a size"),
        ("logits = 'first'\n[variants.a]", "--logits first is unknown: use last, all"),
        ("[variants.a]\nrecipe = 'r.toml'\nllm = 'int4'", r"variants\.a has a recipe, .* llm: leave one of the two out"),
        ("[variants.a]\nrecipe = 'r.toml'\nshard_size = '1GB'", "has a recipe, .* shard_size: leave"),
        ("recipe = 'r.toml'\n[variants.a]\nseed = 1", "has a recipe, .* seed: leave"),
    ],
)  # fmt: skip
def test_what_is_refused(text, message, read):
    with pytest.raises(BadInputError, match=message) as caught:
        read(text)
    assert "variants.toml" in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "../out", "a/b", "/tmp", "a\\\\b", ".hidden", "a b", "a\\u0000", "-o"])
def test_names_that_are_no_safe_folders(name, read):
    with pytest.raises(BadInputError, match="cannot be the name of a folder"):
        read(f'[variants."{name}"]')


@pytest.mark.parametrize("name", ["int4", "INT8_ptq", "int4-awq+ptq", "v1.2", "größe"])
def test_names_that_are(name, read):
    assert list(read(f'[variants."{name}"]')) == [name]


def test_a_file_that_is_not_there(tmp_path):
    result = command("build", tmp_path / "none.toml")
    assert result.exit_code == 2
    assert f"{tmp_path / 'none.toml'} does not exist" in result.output


# What the command does with variants, without conversions.


class Conversions:
    """Stands for `vlmconvert.convert`; a variant fails or passes as its seed says."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def __call__(
        self, *, output: Path, dry_run: bool, seed: int = 0, reporter: object, **arguments: object
    ) -> Converted:
        self.calls.append((output.name, dry_run))
        errors = {
            1: BadInputError("the disk is full: free some space"),
            3: ConversionError("pass stitch failed on x"),
            4: RuntimeError("never seen before"),
            5: CheckFailedError("no"),
        }
        if not dry_run and seed in errors:
            raise errors[seed]
        if dry_run and seed == 6:
            raise BadInputError("group size 48 is not possible: use 64")
        recipe = Recipe.model_validate({"target": "openvino", "components": {"a": {"passes": ["split"]}}})
        return Converted(output, recipe, None if dry_run else self.manifest(output.name, passed=seed != 2), 1.0)

    def manifest(self, name: str, passed: bool) -> Manifest:
        component = {"name": "model", "role": "", "format": "x", "precision": f"precision-of-{name}", "logits": None}
        lists = {"files": [], "inputs": [], "outputs": [], "state": [], "passes": [], "fallbacks": []}
        figure = {"reference": 0.9, "threshold": 1.0, "samples": 1, "component": "artifact"}
        return Manifest.model_validate(
            {
                "name": name,
                "family": "llava",
                "target": "openvino",
                "source": Source(model="x", revision=None, architecture="x", dtype="BF16", files=[]),
                "components": [{**component, **lists, "weights": {}, "blocks": {}}],
                "assets": [],
                "calibration": None,
                "validation": [
                    Validation(metric="kl", value=0.125, passed=passed, **figure),
                    Validation(metric="exact_match", value=0.875, passed=True, **figure),
                ],
                "environment": {},
            }
        )


@pytest.fixture
def conversions(monkeypatch) -> Conversions:
    made = Conversions()
    made.__signature__ = inspect.signature(vlmconvert.convert)
    monkeypatch.setattr(vlmconvert, "convert", made)
    return made


@pytest.fixture
def build(tmp_path):
    def run(text: str, *options: str):
        (tmp_path / "variants.toml").write_text(text, encoding="utf-8")
        return command("build", tmp_path / "variants.toml", "-o", tmp_path / "out", *options)

    return run


def rows(output: str) -> dict[str, list[str]]:
    """Variant -> cells of the last table."""
    lines = [line for line in output[output.rindex("Variants") :].splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("│").split("│")] for line in lines)}


def test_all_variants_are_planned_before_the_first_is_made(build, conversions):
    result = build("[variants.a]\n[variants.b]\n[variants.c]\n")
    assert result.exit_code == 0, result.output
    assert conversions.calls == [(name, planning) for planning in (True, False) for name in "abc"]
    precision = "precision-of-a"
    assert rows(result.output)["a"] == ["openvino", precision, "-", "0 B", "0.12", "90.0%", "87.5%", "1 s", "ok"]
    assert list(rows(result.output)) == ["a", "b", "c"]


def test_a_mistake_in_the_last_one_is_found_before_work(build, conversions):
    result = build("[variants.a]\n[variants.b]\nseed = 6\n")
    assert result.exit_code == 2
    assert conversions.calls == [("a", True), ("b", True)]
    assert "vlmconvert: variant b: group size 48 is not possible: use 64" in result.output


@pytest.mark.parametrize(
    ("seeds", "code"), [((2,), 1), ((5,), 1), ((1,), 2), ((3,), 3), ((4,), 3), ((2, 1), 2), ((3, 2), 3), ((1, 4), 3)]
)
def test_one_that_fails_does_not_stop_the_others(seeds, code, build, conversions):
    text = "".join(f"[variants.v{seed}]\nseed = {seed}\n" for seed in seeds)
    result = build(f"{text}[variants.last]\n")
    assert result.exit_code == code, result.output
    assert [name for name, planning in conversions.calls if not planning] == [*(f"v{seed}" for seed in seeds), "last"]
    found = rows(result.output)
    assert found.pop("last")[-1] == "ok"
    assert [row[-1] for row in found.values()] == ["check failed" if seed == 2 else "failed" for seed in seeds]
    for seed, text in ((1, "v1: the disk is full"), (3, "v3: pass stitch failed"), (4, "v4: RuntimeError: never seen")):
        assert (text in result.output) == (seed in seeds)
    assert "Traceback" not in result.output


def test_debug_shows_where_a_variant_failed(tmp_path, conversions):
    (tmp_path / "variants.toml").write_text("[variants.a]\nseed = 4\n[variants.b]\n", encoding="utf-8")
    result = command("--debug", "build", tmp_path / "variants.toml", "-o", tmp_path)
    assert result.exit_code == 3
    assert "Traceback" in result.output
    assert "RuntimeError: never seen before" in result.output


def test_only_some_variants(build, conversions):
    result = build("[variants.a]\n[variants.b]\n[variants.c]\n", "--only", "c", "--only", "a")
    assert result.exit_code == 0, result.output
    assert [name for name, planning in conversions.calls if not planning] == ["a", "c"]
    result = build("[variants.a]\n[variants.b]\n", "--only", "d")
    assert result.exit_code == 2
    assert re.search(r"variants\.toml has no variant d: its variants are a, b", result.output)


def test_a_dry_run_makes_nothing(build, conversions):
    result = build("[variants.a]\n[variants.b]\n", "--dry-run")
    assert result.exit_code == 0, result.output
    assert conversions.calls == [("a", True), ("b", True)]


# And with conversions.


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three variants, of which two share a component: where they lie, what was printed, and what was typed."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "checkpoint").symlink_to(demo_checkpoint("mllama"))
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    text = """
checkpoint = "checkpoint"
llm = "fp16"
vision = "int8"
validate = false
shard_size = "1MB"
[variants.half]
[variants.ascend]
target = "ascend"
[variants.mixed]
recipe = "recipe.toml"
"""
    (folder / "variants.toml").write_text(text, encoding="utf-8")
    arguments = ("build", folder / "variants.toml", "-o", folder / "out", "--store", folder / "store", "--workers", "1")
    planned = command(*arguments, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert not (folder / "out").exists()
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return folder / "out", planned.output, result.output, arguments


def test_every_variant_becomes_a_folder(built):
    folder, _, output, _ = built
    assert sorted(path.name for path in folder.iterdir()) == ["ascend", "half", "mixed"]
    manifests = {path.name: read_manifest(path) for path in folder.iterdir()}
    assert [item.precision for item in manifests["half"].components] == ["int8", "fp16"]
    assert [item.logits for item in manifests["half"].components] == [None, "last"]
    assert [item.logits for item in manifests["mixed"].components] == [None, "all"]
    assert manifests["ascend"].target == "ascend"
    assert {name: row[0] for name, row in rows(output).items()} == {
        "half": "openvino",
        "ascend": "ascend",
        "mixed": "openvino",
    }


def test_a_dry_run_shows_every_plan(built):
    _, planned, _, _ = built
    assert planned.count("Plan (BF16 checkpoint)") == 3
    assert planned.count("compress-int8{symmetric=false}") == 2
    assert planned.count("compress-w8a16{group_size=0") == 1


def test_what_one_variant_has_made_is_not_made_again(built):
    _, _, output, _ = built
    assert len(re.findall(r"^vision encoder: compress-int8: \d+ steps", output, flags=re.MULTILINE)) == 1
    assert re.findall(r"^(.*): found in the store$", output, flags=re.MULTILINE) == ["vision encoder"]


def test_built_again_it_is_the_same(built):
    folder, _, _, arguments = built
    before = {path.name: (path / MANIFEST_NAME).read_bytes() for path in folder.iterdir()}
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("already holds this result") == 3
    assert {path.name: (path / MANIFEST_NAME).read_bytes() for path in folder.iterdir()} == before
