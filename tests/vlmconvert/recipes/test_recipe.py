"""Recipes: what options mean as text, and what the recipe of a finished artifact makes again."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmconvert
from manifests.beside import RUN_LOG_NAME
from manifests.io import read_manifest, write_manifest
from tests.conftest import vlmconvert as command
from vlmconvert.precisions import PRECISIONS, Precision, precision_names
from vlmconvert.recipes.recipe import Recipe, read_recipe, recipe_text
from vlmconvert.targets import TARGETS

pytestmark = pytest.mark.usefixtures("elsewhere")

CELLS = [
    (target, llm, vision)
    for target in TARGETS.builtin
    for llm in precision_names("language", target)
    for vision in precision_names("vision", target) or (None,)
]


def dry(tmp_path: Path, **arguments) -> tuple[Recipe, str, str]:
    """A recipe, its text, and the name that its artifact would have."""
    file = tmp_path / "saved.toml"
    result = vlmconvert.convert(dry_run=True, save_recipe=file, **arguments)
    return result.recipe, file.read_text(encoding="utf-8"), result.output.name


@pytest.mark.parametrize(("target", "llm", "vision"), CELLS)
def test_options_become_a_recipe_that_is_read_back(target, llm, vision, store, tmp_path):
    recipe, text, name = dry(tmp_path, family="llava", target=target, llm=llm, vision=vision, store=store)
    assert name == "-".join(filter(None, ("llava", target, llm, vision)))
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    assert read_recipe(file) == recipe
    assert dry(tmp_path, family="llava", recipe=file, store=store) == (recipe, text, name)
    assert dry(tmp_path, family="llava", recipe=recipe, store=store) == (recipe, text, name)


def test_every_option_is_in_the_recipe(store, tmp_path):
    options = {
        "group_size": 128,
        "symmetric": True,
        "ratio": 0.75,
        "all_layers": True,
        "scale_estimation": False,
        "smooth_quant_alpha": 0.25,
    }
    settings = {"calibration": "scenes", "samples": 3, "vision_samples": 4, "sequence_length": 99, "seed": 7}
    recipe, text, _ = dry(tmp_path, family="mllama", llm="int4-awq", logits="all", **options, **settings, store=store)
    assert recipe.components["language_model"].passes == [
        "split",
        "export-openvino{dtype=f32}",
        "measure-sensitivity{group_size=128}",
        "compress-int4-awq{group_size=128,symmetric=true,ratio=0.75,all_layers=true,scale_estimation=false,data_free=false}",
        "stitch",
        "make-stateful",
    ]
    assert recipe.components["vision_encoder"].passes[-2] == "quantize-int8-ptq{smooth_quant_alpha=0.25}"
    assert recipe.calibration.model_dump() == {"source": settings.pop("calibration"), **settings}
    for name, value in settings.items():
        assert f"{name} = {value}\n" in text
    assert "[options]" not in text  # the passes say all of them


def test_a_recipe_whose_passes_look_at_no_samples_says_nothing_of_them(store, tmp_path):
    _, text, _ = dry(tmp_path, family="llava", llm="int4", vision="int8", store=store)
    assert "[calibration]" not in text
    _, text, _ = dry(tmp_path, family="llava", target="ascend", shard_size="500MB", store=store)
    assert "shard_size = 500000000\n" in text


@pytest.mark.parametrize("pattern", ["a.b", "*", "layers.[0-3].*", "ü", 'with "quotes"', "back\\slash", "# no comment"])
def test_patterns_keep_their_characters(pattern, tmp_path):
    component = {"passes": ["split"], "layers": {pattern: "int8", "z": "fp16"}}
    recipe = Recipe.model_validate({"target": "openvino", "components": {"language_model": component}})
    (tmp_path / "recipe.toml").write_text(recipe_text(recipe), encoding="utf-8")
    again = read_recipe(tmp_path / "recipe.toml")
    assert again == recipe
    assert list(again.components["language_model"].layers) == [pattern, "z"]


def test_what_a_precision_needs_beside_vlmconvert_is_looked_for_before_work(store, monkeypatch):
    row = Precision("nf4", ("language",), ("openvino",), packages=("no_such_package",))
    monkeypatch.setitem(PRECISIONS.builtin, "nf4", row)
    result = command("llava", "--llm", "nf4", "--dry-run", "--store", store)
    assert result.exit_code == 2, result.output
    assert "no_such_package" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--llm", "int8-ptq"), "--llm"),  # of the other side: no choice
        (("--vision", "int4"), "--vision"),
        (("--llm", "w8a16"), "--llm w8a16 does not go with --target openvino"),
        (("--target", "ascend", "--llm", "int8"), "--llm int8 does not go with --target ascend"),
        (("--target", "ascend", "--vision", "int8"), "--vision int8 does not go with --target ascend"),
        (("--target", "ascend", "--symmetric"), "--symmetric does not go with --target ascend"),
    ],
)
def test_precisions_and_options_that_do_not_go_together(options, message, store):
    result = command("llava", *options, "--dry-run", "--store", store)
    assert result.exit_code == 2, result.output
    assert message in result.output


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """An artifact for Ascend in several files; `test_layers` has those with graphs."""
    folder = tmp_path_factory.mktemp("ascend") / "out"
    options = {"shard_size": "1MB", "outlier_suppression": "equalize", "group_size": 64}
    vlmconvert.convert(family="llava", target="ascend", **options, output=folder, store=folder.parent, validate=False)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def printed(artifact: Path, folder: Path) -> Path:
    """What `vlmconvert recipe` prints of an artifact, as a file."""
    result = command("recipe", artifact)
    assert result.exit_code == 0, result.output
    (folder / "recipe.toml").write_text(result.output, encoding="utf-8")
    return folder / "recipe.toml"


def test_the_recipe_of_an_artifact_gives_the_same_bytes(artifact, tmp_path):
    recipe = printed(artifact, tmp_path)
    options = ("--recipe", recipe, "--no-validate", "--store", tmp_path / "empty")
    result = command("llava", *options, "-o", tmp_path / "again")
    assert result.exit_code == 0, result.output
    again, first = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RUN_LOG_NAME}
        for folder in (tmp_path / "again", artifact)
    )
    assert again == first
    result = command("llava", *options, "-o", artifact)
    assert result.exit_code == 0, result.output
    assert "already holds this result" in result.output


@pytest.mark.parametrize(
    ("old", "new"),
    [("shard_size = 1000000", "shard_size = 2000000"), ("group_size=64", "group_size=32"), ("=equalize", "=none")],
)
def test_a_changed_recipe_is_another_result(artifact, old, new, store, tmp_path):
    recipe = printed(artifact, tmp_path)
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    result = command("llava", "--recipe", recipe, "-o", artifact, "--store", store, "--dry-run")
    assert result.exit_code == 2
    assert "holds a different result" in result.output


def test_an_artifact_of_an_older_version_has_no_recipe(artifact, tmp_path):
    write_manifest(read_manifest(artifact).model_copy(update={"settings": None}), tmp_path)
    result = command("recipe", tmp_path)
    assert result.exit_code == 2
    assert "older vlmconvert" in result.output


def test_the_recipe_of_no_artifact(tmp_path):
    result = command("recipe", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path} holds no manifest.json" in result.output


def test_dry_run_writes_the_recipe_and_nothing_else(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("llava", "--dry-run", "--save-recipe", "recipe.toml", "--store", store)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert list(recipe.components) == ["vision_embeddings", "text_embeddings", "language_model"]
    result = command("llava", "--recipe", "recipe.toml", "--dry-run", "--save-recipe", "again.toml", "--store", store)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "recipe.toml").read_bytes()


def test_a_recipe_that_cannot_be_written_is_said_before_the_plan(store, tmp_path):
    options = ("--dry-run", "--store", store, "--save-recipe", tmp_path / "nowhere" / "recipe.toml")
    result = command("llava", *options)
    assert result.exit_code == 2, result.output
    assert "--save-recipe" in result.output
    assert "Plan" not in result.output
