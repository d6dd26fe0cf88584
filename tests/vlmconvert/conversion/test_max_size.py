"""`--max-size`: the size is kept, the choice is recorded, and it is better than 4 bit for all layers.

`tests/realistic` compares it with `int4-gptq`, beside which the demos lose too little to tell.
"""

from __future__ import annotations

import pytest

from manifests.io import read_manifest
from tests.conftest import exhaustive_but, vlmconvert

pytestmark = pytest.mark.slow

FEW = ("--samples", "16", "--validation-samples", "40", "--max-drop", "100")


def size(manifest):
    return sum(file.size for component in manifest.components for file in component.files)


def kl(manifest):
    (found,) = (item for item in manifest.validation if (item.metric, item.component) == ("kl", "artifact"))
    return found.value


def hashes(manifest):
    return {file.path: file.sha256 for component in manifest.components for file in component.files}


@pytest.fixture(scope="module")
def convert(tmp_path_factory, store):
    def run(*options, samples=FEW):
        output = tmp_path_factory.mktemp("artifact") / "out"
        result = vlmconvert("llava", *options, *samples, "-o", output, "--store", store)
        assert result.exit_code == 0, result.output
        return read_manifest(output), result.output

    return run


@pytest.mark.parametrize("target", exhaustive_but(["openvino"], ["openvino", "onnx"]))
def test_a_model_of_the_size_of_one_format_for_all_layers_is_better(convert, tmp_path, target):
    uniform, _ = convert("--target", target, "--llm", "int4", "--vision", "int8")
    limit, recipe = size(uniform), tmp_path / "recipe.toml"
    fitted, output = convert("--target", target, "--max-size", f"{limit}", "--save-recipe", recipe)
    assert 0.93 * limit < size(fitted) <= limit
    assert kl(fitted) < 0.3 * kl(uniform)
    assert "int4-g128" in output
    assert "self_attn.q_proj" in output
    for component in fitted.components:
        weights = [name for name in component.layers if name.endswith(".weight")]
        assert len(weights) == len(component.layers) > 0
        assert set(component.layers.values()) <= {"int4-g128", "int4-g64", "int4-g32", "int8", "fp16"}
    budget = fitted.size_budget
    assert budget.limit == limit
    assert kl(fitted) / 4 < budget.kl < 4 * kl(fitted)
    assert budget.curve[0].size < limit < budget.curve[-1].size
    again, _ = convert("--recipe", recipe, samples=FEW[2:])
    assert hashes(again) == hashes(fitted)
    assert again.size_budget is None


def test_one_side_may_have_a_precision(convert):
    fitted, _ = convert("--vision", "int8", "--max-size", "6.5bits")
    by_name = {component.name: component for component in fitted.components}
    assert by_name["vision_embeddings"].precision == "int8"
    assert not by_name["vision_embeddings"].layers
    assert by_name["language_model"].layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-size", "10kB"), "is too small for llava: the smallest formats make"),
        (("--max-size", "2bits", "--vision", "fp16"), "or leave out the precision of the vision side"),
        (("--max-size", "large"), "is not a size: write it as 4GB or 500MB, or as bits for each weight: 4.5bits"),
        (("--max-size", "3MB", "--llm", "int4", "--vision", "int8"), "leave out --llm or --vision"),
        (("--max-size", "3MB", "--samples", "0"), "but there are none: use --samples 64"),
        (("--max-size", "3MB", "--target", "ascend"), "--max-size does not go with --target ascend"),
        (("--max-size", "3MB", "--ratio", "0.8"), "--ratio does not go with --max-size"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(store, tmp_path, options, message):
    result = vlmconvert("llava", *options, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "measure-formats" not in result.output
    assert not (tmp_path / "out").exists()


def test_an_output_that_may_not_be_replaced_is_refused_before_anything_is_measured(store, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = vlmconvert("llava", "--max-size", "3MB", "-o", tmp_path, "--store", store)
    assert result.exit_code == 2, result.output
    assert "measure-formats" not in result.output
