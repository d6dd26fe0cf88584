"""`import vlmconvert`: what the commands do as functions, which are silent, typed, and what the commands themselves call."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from PIL import Image

import vlmconvert
from manifests.check_report import CheckReport
from manifests.errors import BadInputError
from manifests.evaluation import Evaluation
from manifests.io import write_manifest
from manifests.model import Manifest
from manifests.verify import Finding
from tests.conftest import vlmconvert as command
from vlmconvert.commands.cli import main
from vlmconvert.console import Reporter
from vlmconvert.conversion.convert import Converted
from vlmconvert.families import demo_checkpoint
from vlmconvert.recipes.recipe import Recipe
from vlmconvert.running.model import VisionLanguageModel

FUNCTIONS = [name for name in vlmconvert.__all__ if name != "__version__"]


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, vlmconvert\n"
        "heavy = {'torch', 'openvino', 'nncf', 'transformers', 'numpy', 'datasets', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_typed_and_described(name):
    function = getattr(vlmconvert, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    text = inspect.getdoc(function)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
        if len(signature.parameters) > 1:
            assert f"    {parameter.name}: " in text, parameter.name
    assert "Raises:\n" in text


@pytest.mark.parametrize("package", ["vlmconvert", "passes", "calibration", "manifests"])
def test_type_checkers_are_told(package):
    assert Path(sys.modules[package].__file__).with_name("py.typed").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small artifact that is made without a trace."""
    place = tmp_path_factory.mktemp("api")
    vlmconvert.convert(family="llava", target="ascend", output=place / "out", store=place / "store", validate=False)
    return place / "out"


# Commands are nothing but these functions.


CALLS = [
    (("convert", "ck", "--llm", "int8"), "convert", {"checkpoint": "ck", "family": None, "llm": "int8"}),
    (("convert", "ck", "--target", "onnx"), "convert", {"target": "onnx", "llm": None, "vision": None, "ratio": None}),
    (
        ("mllama", "--ratio", "0.5", "--no-scale-estimation", "-o", "o"),
        "convert",
        {"family": "mllama", "checkpoint": None, "ratio": 0.5, "scale_estimation": False, "output": Path("o")},
    ),
    (
        ("llava", "ck", "--target", "ascend", "--shard-size", "1GB"),
        "convert",
        {"family": "llava", "target": "ascend", "shard_size": "1GB", "workers": None, "validate": True},
    ),
    (("recipe", "a"), "read_manifest", {"folder": Path("a")}),
    (("verify", "a", "--no-run"), "verify", {"folder": Path("a"), "run": False, "device": "CPU"}),
    (("evaluate", "a", "--samples", "3"), "evaluate", {"folder": Path("a"), "samples": 3, "data": "scenes"}),
    (
        ("check", "a", "--baseline", "b", "--max-drop", "2"),
        "check",
        {"folder": Path("a"), "baseline": Path("b"), "max_drop": 2.0, "samples": 200},
    ),
]


@pytest.mark.parametrize(("typed", "name", "given"), CALLS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_the_commands_call_the_functions(typed, name, given, monkeypatch):
    signature = inspect.signature(getattr(vlmconvert, name))
    seen: dict[str, object] = {}

    def called(*arguments: object, **keywords: object) -> None:
        bound = signature.bind(*arguments, **keywords).arguments
        seen.update(bound.pop("options", {}), **bound)
        raise BadInputError("called")

    monkeypatch.setattr(vlmconvert, name, called)
    result = command(*typed)
    assert result.exit_code == 2, result.output
    assert "vlmconvert: called" in result.output
    assert {key: seen.get(key, "missing") for key in given} == given


@pytest.mark.parametrize("name", ["convert", "verify", "evaluate", "check"])
def test_functions_and_commands_have_the_same_defaults(name):
    parameters = inspect.signature(getattr(vlmconvert, name)).parameters
    typed = main.get_command(click.Context(main), name).make_context(name, [], resilient_parsing=True).params
    defaults = {item: parameters[item].default for item in typed.keys() & parameters.keys()}
    defaults = {item: value for item, value in defaults.items() if value not in (None, inspect.Parameter.empty)}
    assert len(defaults) >= 2
    assert {item: typed[item] for item in defaults} == defaults


# What they return.


def test_a_conversion_says_nothing_and_returns_what_was_made(folder, tmp_path, capfd):
    arguments = {"family": "llava", "target": "ascend", "store": tmp_path, "validate": False}
    planned = vlmconvert.convert(**arguments, output=tmp_path / "out", dry_run=True)
    made = vlmconvert.convert(demo_checkpoint("llava"), **arguments, output=str(tmp_path / "out"))
    assert isinstance(planned, Converted)
    assert isinstance(made, Converted)
    assert isinstance(made.recipe, Recipe)
    assert isinstance(made.manifest, Manifest)
    assert planned.manifest is None
    assert (planned.output, planned.recipe, planned.passed) == (made.output, made.recipe, made.passed)
    assert made.output == tmp_path / "out"
    assert made.manifest == vlmconvert.read_manifest(tmp_path / "out") == vlmconvert.read_manifest(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("elsewhere")
def test_with_a_reporter_it_says_what_the_command_says(tmp_path, capfd):
    arguments = {"target": "ascend", "store": tmp_path, "dry_run": True}
    vlmconvert.convert(family="llava", **arguments, reporter=Reporter())
    said = capfd.readouterr().out
    assert "compress-w8a16{group_size=0" in said
    assert said == command("llava", "--target", "ascend", "--store", tmp_path, "--dry-run").stdout


def test_an_artifact_is_verified_measured_compared_and_run(folder, tmp_path, capfd):
    findings = vlmconvert.verify(str(folder), run=False)
    assert all(isinstance(item, Finding) for item in findings)
    assert {item.outcome for item in findings} == {"passed", "skipped"}
    few = {"samples": 2, "store": tmp_path / "store"}
    evaluation = vlmconvert.evaluate(folder, checkpoint="", output=tmp_path / "evaluation", max_new_tokens=2, **few)
    assert isinstance(evaluation, Evaluation)
    assert {figure.metric for figure in evaluation.figures} == {"exact_match"}
    report = vlmconvert.check(folder, str(folder), samples=2)
    assert isinstance(report, CheckReport)
    assert report.passed
    model = vlmconvert.load(folder)
    assert isinstance(model, VisionLanguageModel)
    processor = vlmconvert.load_processor(folder)
    inputs = processor(images=[Image.new("RGB", (32, 32))], text=["<image>What is it?"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "detail"), [({"run_plan": None}, "run plan"), ({"target": "onnx"}, "the target is onnx")]
)
def test_what_no_artifact_of_a_target_can_be_is_found(change, detail, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    write_manifest(vlmconvert.read_manifest(folder).model_copy(update=change), tmp_path / "copy")
    found = [item for item in vlmconvert.verify(tmp_path / "copy") if item.outcome != "passed"]
    assert {(item.check, item.outcome) for item in found} == {("target", "failed"), ("graph", "skipped")}
    assert detail in found[0].detail
    result = command("verify", tmp_path / "copy")
    assert result.exit_code == 1
    assert detail in result.output


# What they refuse.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4}, "bits is not an option of target openvino: its options are all_layers, group_size"),
        ({"shard_size": "1GB"}, "shard_size is not an option of target openvino"),
        ({"target": "ascend", "ratio": 0.5}, "ratio is not an option of target ascend"),
        ({"target": "coreml"}, "there is no target coreml"),
        ({"llm": "int3"}, "there is no precision int3"),
        ({"llm": "int8-ptq"}, "--llm"),
        ({"group_size": "64"}, "--group-size '64' cannot be used: give a whole number"),
        ({"group_size": 48}, "group size 48"),
        ({"logits": "first"}, "--logits first is unknown"),
        ({"samples": -1}, "--samples -1 is too small: use 0 or more"),
        ({"vision_samples": 0}, "--vision-samples 0 is too small: use 1 or more"),
        ({"workers": 0}, "--workers 0 is too small"),
        ({"recipe": "nowhere.toml"}, "nowhere.toml does not exist"),
        ({"checkpoint": "./nowhere", "family": None}, "./nowhere"),
        ({"family": "vipllava"}, "there is no family vipllava"),
        ({"family": None}, "there is no checkpoint"),
        ({"family": "llava-next"}, "llava-next has no demo checkpoint"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_a_conversion_refuses(arguments, message, store):
    with pytest.raises(BadInputError) as caught:
        vlmconvert.convert(**{"family": "llava", "dry_run": True, "store": store} | arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"llm": "int8"}, "llm"),
        ({"vision": "int8"}, "vision"),
        ({"target": "onnx"}, "target"),
        ({"group_size": 64}, "group_size"),
        ({"seed": 1}, "calibration"),
    ],
)
def test_a_recipe_takes_no_options(arguments, name):
    recipe = Recipe.model_validate({"target": "openvino", "components": {"model": {"passes": ["split"]}}})
    with pytest.raises(BadInputError, match=f"^{name} .* recipe.*: leave it out$"):
        vlmconvert.convert(family="llava", recipe=recipe, **arguments)


@pytest.mark.parametrize("name", ["load", "read_manifest", "verify", "evaluate"])
def test_what_is_no_artifact(name, tmp_path):
    with pytest.raises(BadInputError, match=r"holds no manifest\.json"):
        getattr(vlmconvert, name)(tmp_path)
