"""Mistakes that people make with checkpoints, and checkpoints that only look wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifests.io import read_manifest
from tests.checkpoints import write_checkpoint
from tests.conftest import vlmconvert
from tests.hostile.checkpoints import LM_HEAD, Q_PROJ, edit
from vlmconvert.families import demo_checkpoint

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"
UP_PROJ = "language_model.model.layers.1.mlp.up_proj.weight"
POSITIONS = "vision_tower.vision_model.embeddings.position_ids"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(demo_checkpoint("llava"), tmp_path / "checkpoint")


def change(folder: Path, **tensors: torch.Tensor) -> Path:
    """Add tensors to a checkpoint, or replace them."""
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def changed(folder: Path, name: str, value: float, place: tuple[int, ...]) -> Path:
    tensor = load_file(folder / WEIGHTS)[name]
    tensor[place] = value
    return change(folder, **{name: tensor})


def shard(folder: Path) -> None:
    """Write the weights a second time, as two shards with their index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def plan(folder, store, *options):
    return vlmconvert(
        "convert", folder, "--no-validate", *options, "--dry-run", "-o", folder.parent / "out", "--store", store
    )


def test_the_files_that_transformers_loads_are_converted(checkpoint, store, tmp_path):
    shard(checkpoint)
    tensors = load_file(checkpoint / WEIGHTS)
    torch.manual_seed(0)
    noise = {name: 0.05 * torch.randn_like(value.float()) if value.ndim > 1 else 0 for name, value in tensors.items()}
    change(checkpoint, **{name: (value + noise[name]).to(value.dtype) for name, value in tensors.items()})
    options = ("--llm", "fp32", "--vision", "fp32", "--validation-samples", "4", "-o", tmp_path / "out")
    result = vlmconvert("llava", checkpoint, *options, "--store", store)
    assert result.exit_code == 0, result.output
    assert "model-00001-of-00002.safetensors" in next(
        line for line in result.output.splitlines() if line.startswith("not read, since transformers loads other files")
    )
    manifest = read_manifest(tmp_path / "out")
    # The reference is the model that transformers loads from the folder.
    kl = [item.value for item in manifest.validation if item.metric == "kl"]
    assert kl
    assert max(kl) < 1e-4
    assert WEIGHTS in {file.path for file in manifest.source.files}
    assert not any("-of-" in file.path for file in manifest.source.files)


@pytest.mark.parametrize("target", [("openvino", "--llm", "fp16"), ("ascend", "--llm", "w8a16")])
def test_tensors_that_nothing_reads_are_ignored(checkpoint, store, target):
    buffers = {
        POSITIONS: torch.arange(65, dtype=torch.int32)[None],
        "language_model.model.rotary_emb.inv_freq": torch.ones(16, dtype=torch.float64),
        "language_model.model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "language_model.model.layers.0.self_attn.masked_bias": torch.ones(4, 4, dtype=torch.uint8),
        "language_model.model.layers.0.self_attn.cache": torch.ones(4, 4).to(torch.float8_e4m3fn),
    }
    result = plan(change(checkpoint, **buffers), store, "--target", *target)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("not read"))
    assert all(name.rpartition(".")[2] in line for name in buffers)


PLANS = [
    *(
        (target, "--llm", llm)
        for target in ("openvino", "onnx")
        for llm in ("fp32", "fp16", "int8", "int4", "int4-awq")
    ),
    ("ascend",),
]


@pytest.mark.parametrize("target", PLANS, ids=" ".join)
def test_nan_is_refused_for_every_target_and_precision(checkpoint, store, tmp_path, target):
    changed(checkpoint, UP_PROJ, float("nan"), (3, 5))
    vision = () if target == ("ascend",) else ("--vision", "fp16")
    options = ("--target", *target, *vision, "--no-validate", "-o", tmp_path / "out", "--store", store)
    result = vlmconvert("llava", checkpoint, *options)
    assert result.exit_code == 2, result.output
    assert f"tensor {UP_PROJ} holds NaN or infinity, first at [3, 5]" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_weight_beyond_float16_is_converted_where_it_is_not_stored_so(checkpoint, store, tmp_path):
    changed(checkpoint, UP_PROJ, 1e5, (3, 5))
    run = ("llava", checkpoint, "--vision", "fp16", "--no-validate", "-o", tmp_path / "out", "--store", store)
    result = vlmconvert(*run, "--llm", "fp16")
    assert result.exit_code == 2
    assert f"{UP_PROJ} holds 99840, beyond the range of float16, first at [3, 5]" in result.output
    assert "--llm fp32" in result.output
    assert vlmconvert(*run, "--llm", "fp32").exit_code == 0


def test_a_scale_beyond_float16_is_refused_by_the_weights_name(checkpoint, store, tmp_path):
    changed(checkpoint, UP_PROJ, 1e8, (3, 5))
    options = ("--llm", "int8", "--vision", "fp16", "--no-validate", "-o", tmp_path / "out", "--store", store)
    result = vlmconvert("llava", checkpoint, *options)
    assert result.exit_code == 2, result.output
    assert "tensor model.language_model.layers.1.mlp.up_proj.weight is too large for this precision" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("target", ["openvino", "ascend"])
def test_adapters_can_be_left_out(checkpoint, store, target):
    name = f"{Q_PROJ}.lora_A.default.weight"
    change(checkpoint, **{name: torch.ones(4, 128)})
    (checkpoint / "adapter_config.json").write_text("{}")
    refused = plan(checkpoint, store, "--target", target)
    assert refused.exit_code == 2
    assert "adapter_config.json" in refused.output
    (checkpoint / "adapter_config.json").unlink()
    refused = plan(checkpoint, store, "--target", target)
    assert refused.exit_code == 2
    assert f"({name}): merge them first (merge_and_unload)" in refused.output
    result = plan(checkpoint, store, "--target", target, "--ignore-unused")
    assert result.exit_code == 0, result.output
    assert "lora_A" in result.output


def test_a_build_file_can_leave_adapters_out(checkpoint, store, tmp_path):
    change(checkpoint, **{f"{Q_PROJ}.lora_B.default.weight": torch.ones(128, 4)})
    file = tmp_path / "variants.toml"
    text = 'checkpoint = "checkpoint"\nllm = "fp16"\nvision = "fp16"\n[variants.one]\n'
    for more, code in (("", 2), ("ignore_unused = true\n", 0)):
        file.write_text(more + text)
        assert vlmconvert("build", file, "-o", tmp_path / "out", "--dry-run", "--store", store).exit_code == code


def as_in_the_hubs_cache(checkpoint: Path, cache: Path) -> Path:
    """Lay a checkpoint out as huggingface_hub does: links into a folder beside the snapshots."""
    folder = cache / "models--org--name" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (cache / "models--org--name" / "blobs").mkdir()
    for path in checkpoint.iterdir():
        blob = cache / "models--org--name" / "blobs" / f"sha-{path.name}"
        shutil.copyfile(path, blob)
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    return folder


def test_links_of_the_hubs_cache_are_followed(checkpoint, store, tmp_path):
    folder = as_in_the_hubs_cache(checkpoint, tmp_path / "cache")
    result = plan(folder, store, "--llm", "fp16", "--vision", "fp16")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "chat_template.jinja", "tokenizer.json"])
def test_a_stranger_cannot_pretend_to_be_the_hubs_cache(checkpoint, store, tmp_path, file):
    folder = as_in_the_hubs_cache(checkpoint, tmp_path / "cache")
    shutil.move(tmp_path / "cache" / "models--org--name" / "blobs", tmp_path / "private")
    (tmp_path / "cache" / "models--org--name" / "blobs").symlink_to(tmp_path / "private")
    for path in folder.iterdir():
        if path.name != file:
            real = path.resolve()
            path.unlink()
            shutil.copyfile(real, path)
    result = plan(folder, store, "--llm", "fp16", "--vision", "fp16")
    assert result.exit_code == 2
    assert f"{file} is a link that leads out of the checkpoint" in result.output


def test_an_attention_that_is_not_installed_does_not_matter(checkpoint, store):
    edit(checkpoint, "config.json", {"attn_implementation": "flash_attention_2"})
    edit(checkpoint, "config.json", {"_attn_implementation": "flash_attention_3"}, "text_config")
    result = plan(checkpoint, store, "--llm", "fp16", "--vision", "fp16")
    assert result.exit_code == 0, result.output


def test_code_of_a_checkpoint_is_never_run(checkpoint, store, tmp_path):
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    edit(checkpoint, "config.json", {"auto_map": {"AutoConfig": "evil.Evil"}})
    edit(checkpoint, "processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}})
    edit(checkpoint, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    result = plan(checkpoint, store, "--llm", "fp16", "--vision", "fp16")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("family", "file", "part", "changes"),
    [
        ("llava-next", "config.json", "", {"image_grid_pinpoints": [[28, 84]]}),
        ("llava-next", "processor_config.json", "image_processor", {"image_grid_pinpoints": [[28, 28]]}),
        ("llava-next", "processor_config.json", "", {"patch_size": 14}),
        ("llava-next-video", "processor_config.json", "", {"vision_feature_select_strategy": "full"}),
        ("llava-next-video", "video_preprocessor_config.json", "", {"crop_size": {"height": 14, "width": 14}}),
    ],
)
def test_a_processor_of_another_model_is_refused(store, tmp_path, family, file, part, changes):
    folder = write_checkpoint(tmp_path / "checkpoint", family)
    options = ("--llm", "fp16", "--vision", "fp16")
    assert plan(folder, store, *options).exit_code == 0
    edit(folder, file, changes, part)
    result = plan(folder, store, *options)
    assert result.exit_code == 2
    assert "does not fit config.json" in result.output.splitlines()[-1]


def test_a_trial_that_went_well_is_not_repeated(checkpoint, store):
    options = ("--llm", "fp16", "--vision", "fp16")
    edit(checkpoint, "tokenizer_config.json", {"note": "a checkpoint that no other test has tried"})
    assert "trying the processor" in plan(checkpoint, store, *options).output
    assert "trying the processor" not in plan(checkpoint, store, *options).output


def test_an_unknown_dtype_of_a_needed_tensor_is_named(checkpoint, store):
    change(checkpoint, **{LM_HEAD: load_file(checkpoint / WEIGHTS)[LM_HEAD].double()})
    result = plan(checkpoint, store)
    assert result.exit_code == 2
    assert f"tensor {LM_HEAD} has dtype F64, expected F32, F16 or BF16" in result.output
