"""A family, a target, precisions and passes of somebody else's package: they are found, and nothing in vlmconvert names them."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
import transformers
from transformers import AutoConfig
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from manifests.io import read_manifest
from passes.base import PASSES
from passes.registry import load_object
from tests.checkpoints import IMAGE, PATCH, SIZE, TEMPLATE, WIDTH, tokenizer
from vlmconvert.families import FAMILIES
from vlmconvert.precisions import PRECISIONS
from vlmconvert.targets import TARGETS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PLUGIN = Path(__file__).with_name("plugin")


def vlmconvert(*arguments, packages=(PLUGIN,)):
    """The command line in a process of its own, in which packages are installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*packages, ROOT)))}
    command = [sys.executable, "-m", "vlmconvert", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random DeepSeek-VL in bfloat16, its LM head tied."""
    folder = tmp_path_factory.mktemp("deepseek")
    tokens = tokenizer()
    special = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.DeepseekVLConfig(
        text_config=AutoConfig.for_model(
            "llama", vocab_size=512, hidden_size=WIDTH, intermediate_size=128, **small, **special
        ),
        vision_config=AutoConfig.for_model(
            "siglip_vision_model", hidden_size=48, intermediate_size=96, image_size=SIZE, patch_size=PATCH, **small
        ),
        image_token_id=tokens.convert_tokens_to_ids(IMAGE),
    )
    torch.manual_seed(0)
    model = transformers.DeepseekVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.generation_config = transformers.GenerationConfig(do_sample=False, **special)
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        tokens,
        chat_template=TEMPLATE,
        num_image_tokens=(SIZE // PATCH) ** 2,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the artifacts and their store lie."""
    return tmp_path_factory.mktemp("plugin")


@pytest.fixture(scope="module")
def artifact(checkpoint, place):
    """The made-up family in the made-up precision, for a target of vlmconvert, held against transformers."""
    precision = ("--llm", "bf16", "--vision", "bf16", "--max-kl", 1e-6, "--validation-samples", 4)
    result = vlmconvert("convert", checkpoint, *precision, "-o", place / "bf16", "--store", place / "store")
    assert result.returncode == 0, result.stderr
    return place / "bf16"


@pytest.mark.parametrize(
    ("registry", "name", "reference"),
    [
        (FAMILIES, "deepseek-vl", "vlmconvert_acme.deepseek_vl.family:FAMILY"),
        (TARGETS, "tensor-names", "vlmconvert_acme.tensor_names:TARGET"),
        (PRECISIONS, "bf16", "vlmconvert_acme.precisions:BF16"),
        (PRECISIONS, "ranks", "vlmconvert_acme.precisions:RANKS"),
        (PASSES, "compress-bf16", "vlmconvert_acme.compress_bf16:CompressBf16Pass"),
        (PASSES, "split-rows", "vlmconvert_acme.split_rows:SplitRowsPass"),
    ],
)
def test_entry_points_are_all_that_leads_to_it(registry, name, reference, monkeypatch):
    assert name not in registry
    monkeypatch.syspath_prepend(PLUGIN)
    looking = replace(registry)  # one that has not looked yet
    assert name in looking
    assert name not in looking.builtin
    assert looking.load(name) is load_object(reference)


def test_help_lists_it():
    overview = vlmconvert("--help")
    assert "deepseek-vl  " in overview.stdout
    help_text = vlmconvert("deepseek-vl", "--help").stdout
    for said in ("tensor-names", "bf16", "--ranks"):
        assert said in help_text


def test_the_family_and_the_block_pass_convert(artifact):
    manifest = read_manifest(artifact)
    assert (manifest.family, manifest.target) == ("deepseek-vl", "openvino")
    for component in manifest.components:
        assert component.precision == "bf16"
        assert component.passes[:3] == ["split", "export-openvino{dtype=f32}", "compress-bf16"]
        assert component.weights.keys() == {"bf16"}
    kl = {item.component: item.value for item in manifest.validation if item.metric == "kl"}
    assert kl.keys() == {"vision_embeddings", "language_model", "artifact"}
    assert max(kl.values()) < 1e-6
    verified = vlmconvert("verify", artifact)
    assert verified.returncode == 0, verified.stdout


def test_the_recipe_of_the_artifact_makes_it_again(artifact, checkpoint, place):
    recipe = place / "recipe.toml"
    recipe.write_text(vlmconvert("recipe", artifact).stdout)
    where = ("-o", place / "again", "--store", place / "store")
    result = vlmconvert("convert", checkpoint, "--recipe", recipe, *where, "--no-validate")
    assert result.returncode == 0, result.stderr
    first, second = read_manifest(artifact), read_manifest(place / "again")
    assert first.model_copy(update={"validation": []}) == second


def stored(checkpoint):
    """Name -> dtype, shape and bytes of each tensor of a checkpoint, as the safetensors library reads them."""
    tensors = safetensors.deserialize((checkpoint / "model.safetensors").read_bytes())
    found = {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in tensors}
    return found | {"lm_head.weight": found["model.language_model.embed_tokens.weight"]}


def test_the_target_and_the_tensor_pass_convert(checkpoint, place):
    where = ("-o", place / "names", "--store", place / "store")
    result = vlmconvert("deepseek-vl", checkpoint, "--target", "tensor-names", "--ranks", 4, *where)
    assert result.returncode == 0, result.stderr
    assert "not validated: vlmconvert cannot run a list of tensors" in result.stdout
    assert "not read" not in result.stdout
    expected = Counter()
    for name, (dtype, shape, data) in stored(checkpoint).items():
        parts = 4 if len(shape) > 1 and shape[0] % 4 == 0 else 1
        for rank in range(parts):
            size = len(data) // parts
            part = [shape[0] // parts, *shape[1:]]
            suffix = f".rank{rank}" if parts > 1 else ""
            checksum = zlib.crc32(data[rank * size : (rank + 1) * size])
            expected[f"{name}{suffix} {dtype} {'x'.join(map(str, part))} {checksum:08x}"] += 1
    lines = (place / "names" / "tensors.txt").read_text().splitlines()
    # On the hub some tensors are called without the model's own prefix.
    assert Counter(line.removeprefix("model.") for line in lines) == Counter(
        line.removeprefix("model.") for line in expected
    )

    manifest = read_manifest(place / "names")
    assert manifest.target == "tensor-names"
    (component,) = manifest.components
    assert (component.precision, component.passes) == ("ranks", ["split-rows{ranks=4}"])
    assert component.weights == {"bf16": sum(len(data) // 2 for _, _, data in stored(checkpoint).values())}
    card = (place / "names" / "README.md").read_text()
    assert "vlmconvert run" not in card
    assert "graph" not in card


def test_the_target_is_verified_and_cannot_be_run(checkpoint, place):
    recipe = place / "names.toml"
    recipe.write_text('target = "tensor-names"\n[components.model]\npasses = ["split-rows{ranks=2}"]\n')
    folder = place / "by recipe"
    result = vlmconvert("convert", checkpoint, "--recipe", recipe, "-o", folder, "--store", place / "store")
    assert result.returncode == 0, result.stderr
    assert read_manifest(folder).components[0].passes == ["split-rows{ranks=2}"]
    assert vlmconvert("verify", folder).returncode == 0
    asked = vlmconvert("run", folder, "--prompt", "What is it?")
    assert asked.returncode == 2
    assert "cannot run" in asked.stderr
    text = folder / "tensors.txt"
    text.write_text("".join(text.read_text().splitlines(keepends=True)[1:]))
    verified = vlmconvert("verify", folder)
    assert verified.returncode == 1
    assert "tensors.txt does not list the weights of the manifest" in " ".join(verified.stdout.split())


# Packages that are not as they should be.


def install(folder, **packages):
    """Lay packages out as pip would: name -> its entry points as (group, name, reference)."""
    for package, points in packages.items():
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {package}\nVersion: 1.0\n")
        lines = (f"[vlmconvert.{group}]\n{name} = {reference}\n" for group, name, reference in points)
        (info / "entry_points.txt").write_text("".join(lines))
    return folder


def check_refused(folder, *arguments, message, mend="uninstall"):
    """A command fails with one sentence."""
    result = vlmconvert(*arguments, packages=(folder, PLUGIN))
    assert result.returncode == 2, result.stderr
    *progress, sentence = result.stderr.splitlines()
    assert sentence.startswith("vlmconvert: ")
    assert message in sentence
    assert mend in sentence
    assert all(line.startswith(("reading the architecture", "verifying ")) for line in progress)


CONVERT = ("llava", "--dry-run")
# An entry point that is not as it should be, a command that meets it, and what is said beside its name and the mend.
WRONG = (
    (("families", "broken", "nowhere:X"), ("broken", "x"), "No module named 'nowhere'"),
    (("targets", "broken", "nowhere:X"), CONVERT, "No module named 'nowhere'"),
    (("precisions", "broken", "nowhere:X"), CONVERT, "No module named 'nowhere'"),
    (("families", "path", "os:path"), ("path", "x"), "vlmconvert.families.base.Family"),
    (("targets", "path", "os:path"), CONVERT, "vlmconvert.targets.base.Target"),
    (("precisions", "path", "os:path"), CONVERT, "vlmconvert.precisions.Precision"),
    (("families", "llava", "nowhere:X"), CONVERT, "family llava"),
    (("targets", "onnx", "nowhere:X"), CONVERT, "target onnx"),
    (("precisions", "int4", "nowhere:X"), CONVERT, "precision int4"),
    (("families", "deepseek-vl", "nowhere:X"), ("deepseek-vl", "x"), "family deepseek-vl"),
)


@pytest.mark.parametrize(("point", "arguments", "message"), WRONG)
def test_what_a_package_brings_wrongly_is_refused(point, arguments, message, tmp_path):
    check_refused(install(tmp_path, one=[point]), *arguments, message=message)


def test_the_commands_are_listed_whatever_packages_bring(tmp_path):
    packages = install(tmp_path, **{f"number{index}": [point] for index, (point, _, _) in enumerate(WRONG)})
    overview = vlmconvert("--help", packages=(packages, PLUGIN))
    assert overview.returncode == 0, overview.stderr
    for name in ("llava  ", "broken  ", "deepseek-vl  ", "verify  "):
        assert name in overview.stdout


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("broken", "nowhere:X", "No module named 'nowhere'"),
        ("path", "os:path", "passes.base.Pass"),
        ("split", "nowhere:X", "pass split"),
        ("split-rows", "nowhere:X", "pass split-rows"),
    ],
)
def test_a_pass_that_a_package_brings_wrongly_is_refused(name, reference, message, checkpoint, place, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'target = "tensor-names"\n[components.model]\npasses = ["{name}"]\n')
    arguments = ("convert", checkpoint, "--recipe", recipe, "--dry-run", "--store", place / "store")
    packages = install(tmp_path, one=[("passes", name, reference)])
    check_refused(packages, *arguments, message=message)


def test_two_packages_with_one_name_are_refused(tmp_path):
    packages = install(tmp_path, one=[("families", "twin", "a:X")], two=[("families", "twin", "b:X")])
    check_refused(packages, "twin", "x", message="family twin")


def test_a_family_called_as_a_command_hides_none(tmp_path):
    packages = install(tmp_path, one=[("families", "verify", "nowhere:FAMILY")])
    check_refused(packages, "verify", tmp_path, message="manifest.json", mend=str(tmp_path))
