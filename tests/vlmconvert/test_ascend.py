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

from calibration.inputs import load_processor, prompt_inputs
from calibration.sources import load_samples
from manifests.errors import BadInputError
from manifests.files import file_record
from passes.checkpoint import open_checkpoint
from passes.compress.w8a16 import CompressW8A16Pass
from passes.validate.ascend import check_folder
from tests.checkpoints import CLASSES, ascend_family, write_checkpoint
from tests.packages import install
from tests.passes.test_architecture import rewrite
from vlmconvert.artifact import processor_files
from vlmconvert.ascend import AscendOptions, inspect, plan_ascend, write_ascend
from vlmconvert.pipeline import Helper

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


@pytest.fixture(scope="module")
def run():
    """The process that may hold torch, as in a conversion."""
    helper = Helper()
    yield helper.run
    helper.close()


def convert(source, folder, run, **options):
    checkpoint = open_checkpoint(source)
    folder.mkdir()
    return write_ascend(checkpoint, inspect(checkpoint, run), AscendOptions(**options), folder, run)


@pytest.mark.parametrize("engine", ["vlmconvert", "msmodelslim"])
@pytest.mark.parametrize("family", CLASSES)
def test_both_engines_write_a_folder_that_runtimes_open(tmp_path, run, family, engine):
    source = write_checkpoint(tmp_path / "in", family, tied=True)
    made = convert(source, tmp_path / "out", run, engine=engine, shard_size=100_000)
    records = [*made.files, *made.assets]
    assert sorted(record.path for record in records) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert records == [file_record(tmp_path / "out" / record.path, tmp_path / "out") for record in records]
    assert [check for check in check_folder(tmp_path / "out", ascend_family(source)) if check.outcome != "passed"] == []
    assert [runtime.runtime for runtime in made.plan.runtimes] == ["mindie", "vllm-ascend"]
    assert made.weights.weights.keys() == {"bf16", "int8"}


@pytest.mark.parametrize("family", ["mllama", *CLASSES])
def test_every_sidecar_is_there_and_processes_as_before(tmp_path, demo, run, family):
    source = demo if family == "mllama" else write_checkpoint(tmp_path / "in", family)
    source = shutil.copytree(source, tmp_path / "source")
    for name in ("special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        if not (source / name).exists():
            (source / name).write_text("{}")
    convert(source, tmp_path / "out", run)
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
    image = load_samples("scenes", 1).samples[0].image
    before, after = (
        prompt_inputs(load_processor(folder), [image], ["What is it?"]) for folder in (source, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("nested", [False, True])
def test_of_two_image_processors_the_nested_one_counts(tmp_path, run, nested):
    """As in transformers 5, by which the checkpoint is judged."""
    source = write_checkpoint(tmp_path / "in")
    path = source / "processor_config.json"
    processor = json.loads(path.read_text())
    if not nested:
        del processor["image_processor"]
        path.write_text(json.dumps(processor))
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor", "own": 1}')
    convert(source, tmp_path / "out", run)
    found = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert ("own" in found) is not nested
    assert "image_processor" not in json.loads((tmp_path / "out" / "processor_config.json").read_text())


def test_transformers_4_opens_every_familys_folder(tmp_path, demo, run):
    """The version of MindIE's time, in a process of its own."""
    packages = tmp_path / "packages"
    try:
        install(packages, "transformers==4.49.0", "tokenizers==0.21.*", "huggingface-hub==0.36.*")
    except subprocess.CalledProcessError:
        pytest.skip("needs transformers 4.49 from a package index")
    for family in ("mllama", *CLASSES):
        source = demo if family == "mllama" else write_checkpoint(tmp_path / f"{family}-in", family)
        convert(source, tmp_path / family, run)
    command = [sys.executable, "-c", TRANSFORMERS_4, *(tmp_path / family for family in ("mllama", *CLASSES))]
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    image = Image.new("RGB", (56, 40), "red")
    for family, opened in zip(("mllama", *CLASSES), found, strict=True):
        processor = load_processor(tmp_path / family)
        inputs = prompt_inputs(processor, [image], ["What is it?"])
        assert opened["input_ids"] == inputs["input_ids"].tolist(), family
        # Pillow is in both, and so are the same roundings.
        np.testing.assert_allclose(opened["mean"], inputs["pixel_values"].mean(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "--shard-size 0 is too small"),
        (
            {"quantize": CompressW8A16Pass(outlier_suppression="equalize"), "engine": "msmodelslim"},
            "--outlier-suppression goes with our own engine",
        ),
        ({"quantize": CompressW8A16Pass(48)}, "--group-size 48 does not divide the 128 input channels"),
    ],
)
def test_options_are_refused_before_any_weight_is_read(tmp_path, run, options, message):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "in"))
    architecture = inspect(checkpoint, run)
    with pytest.raises(BadInputError, match=message):
        plan_ascend(checkpoint, architecture, AscendOptions(**options))


@pytest.mark.parametrize("engine", ["vlmconvert", "msmodelslim"])
def test_nonfinite_weights_are_refused_by_both_engines(tmp_path, run, engine):
    source = write_checkpoint(tmp_path / "in")
    name = "multi_modal_projector.linear_1.weight"

    def change(tensors):
        tensors[name][0, 0] = torch.inf
        return tensors

    rewrite(source, change)
    with pytest.raises(BadInputError, match=f"tensor {name} holds NaN or infinity"):
        convert(source, tmp_path / "out", run, engine=engine)
