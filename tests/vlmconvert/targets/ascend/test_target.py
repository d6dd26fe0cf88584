"""A whole folder: both engines, sidecars, and what transformers makes of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vlmconvert as package
from calibration.sources import load_samples
from manifests.errors import BadInputError
from manifests.files import file_record
from passes.ascend.rules import check_folder
from passes.processor_files import processor_files
from tests.checkpoints import CLASSES, ascend_family, write_checkpoint
from tests.packages import install
from tests.passes.test_architecture import rewrite
from tests.prompts import prompt_inputs
from vlmconvert import load_processor

FAMILIES = ("mllama", *CLASSES)
# Importing msmodelslim takes seconds.
ENGINES = ("vlmconvert", pytest.param("msmodelslim", marks=pytest.mark.slow))
# What MindIE's own script forgets, and what processors of other versions of transformers read.
SIDECARS = {
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


# Opens folders with AutoProcessor and asks about an image as chat templates do.
TRANSFORMERS_4 = """
import json, sys
import transformers
from PIL import Image

assert transformers.__version__ == "4.49.0"
for folder in sys.argv[1:]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert transformers.AutoConfig.from_pretrained(folder).quantize == "w8a16"
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    # The tokenizer writes the first token.
    text = text.removeprefix(processor.tokenizer.bos_token or "")
    inputs = processor(images=[Image.new("RGB", (56, 40), "red")], text=text, return_tensors="pt")
    print(json.dumps({"input_ids": inputs["input_ids"].tolist(), "mean": float(inputs["pixel_values"].mean())}))
"""


def convert(source, folder, store, **options):
    """Convert without validation; returns the manifest."""
    return package.convert(source, target="ascend", output=folder, store=store, validate=False, **options).manifest


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", CLASSES)
def test_both_engines_write_a_folder_that_runtimes_open(tmp_path, store, family, engine):
    source = write_checkpoint(tmp_path / "in", family, tied=True)
    folder = tmp_path / "out"
    manifest = convert(source, folder, store, engine=engine, shard_size=100_000)
    (model,) = manifest.components
    records = [*model.files, *manifest.assets]
    beside = {"README.md", "manifest.json", "manifest.json.sha256", "run.json"}
    assert sorted(record.path for record in records) == sorted({path.name for path in folder.iterdir()} - beside)
    assert records == [file_record(folder / record.path, folder) for record in records]
    assert [check for check in check_folder(folder, ascend_family(source)) if check.outcome != "passed"] == []
    assert [runtime.runtime for runtime in manifest.run_plan.runtimes] == ["mindie", "vllm-ascend"]
    assert model.weights.keys() == {"bf16", "int8"}


def test_groups_are_told_to_readers_and_are_for_no_runtime(tmp_path, checkpoint, store):
    manifest = convert(checkpoint("llava"), tmp_path / "out", store, group_size=32)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["group_size"] == 32
    assert manifest.run_plan.runtimes == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sidecar_is_there_and_processes_as_before(tmp_path, checkpoint, store, family):
    source = shutil.copytree(checkpoint(family), tmp_path / "source")
    for name in ("special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        if not (source / name).exists():
            (source / name).write_text("{}")
    convert(source, tmp_path / "out", store)
    written = {path.name: path.read_bytes() for path in processor_files(tmp_path / "out")}
    assert written.keys() >= SIDECARS
    for path in processor_files(source):
        if path.name not in {"tokenizer_config.json", "processor_config.json"}:
            assert written[path.name] == path.read_bytes(), path.name
    assert json.loads(written["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    # transformers 4 looks for the image processor here, and MindIE reads with it.
    assert json.loads(written["preprocessor_config.json"])["image_processor_type"].startswith(
        ("Mllama", "CLIP", "Llava")
    )
    image = load_samples("scenes", 1).samples[0].images[0]
    before, after = (
        prompt_inputs(load_processor(folder), [image], ["What is it?"]) for folder in (source, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("nested", [False, True])
def test_of_two_image_processors_the_nested_one_counts(tmp_path, checkpoint, store, nested):
    """As in transformers 5, by which the checkpoint is judged."""
    source = shutil.copytree(checkpoint("llava"), tmp_path / "in")
    path = source / "processor_config.json"
    processor = json.loads(path.read_text())
    if not nested:
        del processor["image_processor"]
        path.write_text(json.dumps(processor))
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    images = {"image_processor_type": "CLIPImageProcessor", "own": 1, **sizes}
    (source / "preprocessor_config.json").write_text(json.dumps(images))
    convert(source, tmp_path / "out", store)
    found = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert ("own" in found) is not nested
    assert "image_processor" not in json.loads((tmp_path / "out" / "processor_config.json").read_text())


@pytest.mark.exhaustive
def test_transformers_4_opens_every_familys_folder(tmp_path, checkpoint, artifact):
    """The version of MindIE's time, in a process of its own."""
    packages = tmp_path / "packages"
    try:
        install(packages, "transformers==4.49.0", "tokenizers==0.21.*", "huggingface-hub==0.36.*")
    except subprocess.CalledProcessError:
        pytest.skip("needs transformers 4.49 from a package index")
    folders = {family: artifact(checkpoint(family)) for family in FAMILIES}
    command = [sys.executable, "-c", TRANSFORMERS_4, *folders.values()]
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    image = Image.new("RGB", (56, 40), "red")
    for (family, folder), opened in zip(folders.items(), found, strict=True):
        processor = load_processor(folder)
        inputs = prompt_inputs(processor, [image], ["What is it?"])
        assert opened["input_ids"] == inputs["input_ids"].tolist(), family
        # Pillow is in both, and so are the same roundings.
        np.testing.assert_allclose(opened["mean"], inputs["pixel_values"].mean(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "--shard-size 0 is too small"),
        (
            {"outlier_suppression": "equalize", "engine": "msmodelslim"},
            "--outlier-suppression does not go with --engine msmodelslim",
        ),
        ({"group_size": 48}, "--group-size 48 does not divide the 128 input channels"),
    ],
)
def test_options_are_refused_with_the_plan(tmp_path, checkpoint, store, options, message):
    with pytest.raises(BadInputError, match=message):
        convert(checkpoint("llava"), tmp_path / "out", store, dry_run=True, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_nonfinite_weights_are_refused_by_both_engines(tmp_path, checkpoint, store, engine):
    source = shutil.copytree(checkpoint("llava"), tmp_path / "in")
    name = "multi_modal_projector.linear_1.weight"

    def change(tensors):
        tensors[name][0, 0] = torch.inf
        return tensors

    rewrite(source, change)
    with pytest.raises(BadInputError, match=f"tensor {name} holds NaN or infinity"):
        convert(source, tmp_path / "out", store, engine=engine)
