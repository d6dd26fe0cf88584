import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manifests.errors import BadInputError
from passes.checkpoint import fetch_checkpoint, open_checkpoint
from tests.conftest import vlmconvert


@pytest.fixture
def copy(demo, tmp_path) -> Path:
    return shutil.copytree(demo, tmp_path / "checkpoint")


def shard(folder: Path) -> dict[str, str]:
    """Turn the single file into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_safetensors_reads(tmp_path, dtype):
    tensors = {
        "a": torch.randn(3, 5).to(dtype),
        "b": torch.randn(2, 2, 2).to(dtype),
        "scalar": torch.tensor(1.5).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.float().numpy())


def test_shards_read_as_one_file(copy, demo):
    shard(copy)
    whole, parts = open_checkpoint(demo), open_checkpoint(copy)
    assert parts.weight_files == ["model-0.safetensors", "model-1.safetensors"]
    assert whole.tensors.keys() == parts.tensors.keys()
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(whole.read(name), parts.read(name))


def test_demo_has_on_hub_names(demo):
    names = open_checkpoint(demo).tensors
    assert "language_model.lm_head.weight" in names
    assert all(name.startswith(("language_model.", "vision_model.", "multi_modal_projector.")) for name in names)


def rewrite_index(folder, change):
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    change(index["weight_map"])
    index_file.write_text(json.dumps(index))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_header(folder, change):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


LM_HEAD = "language_model.lm_head.weight"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "quantized": (
        lambda folder: (folder / "config.json").write_text(
            '{"model_type": "mllama", "quantization_config": {"quant_method": "awq"}}'
        ),
        r"already quantized \(awq\)",
    ),
    "quantized by a name": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "mllama", "quantization_config": "fp8"}'),
        r"already quantized \(fp8\)",
    ),
    "quantized text model": (
        lambda folder: (folder / "config.json").write_text(
            '{"model_type": "mllama", "text_config": {"quantization_config": {"quant_method": "gptq"}}}'
        ),
        r"already quantized \(gptq\)",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled weights only.*save_pretrained",
    ),
    "cut": (cut, r"has \d+ bytes, but its header describes \d+"),
    "no header": (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "not a whole safetensors file"),
    "text": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"),
        "not a whole safetensors",
    ),
    "dtype": (
        lambda folder: change_header(folder, lambda h: h[LM_HEAD].update(dtype="I8")),
        r"takes 65536 bytes as I8, and its header gives 131072",
    ),
    "sizes": (
        lambda folder: change_header(folder, lambda h: h[LM_HEAD].update(shape=[7, 7])),
        r"shape \[7, 7\] takes 98 bytes",
    ),
    "index leaves the folder": (
        lambda folder: (
            rewrite_index(folder, lambda m: m.update({LM_HEAD: "../model.safetensors"})) if shard(folder) else None
        ),
        "outside its own folder",
    ),
    "index is absolute": (
        lambda folder: rewrite_index(folder, lambda m: m.update({LM_HEAD: "/etc/passwd"})) if shard(folder) else None,
        "outside its own folder",
    ),
    "shard missing": (
        lambda folder: (folder / "model-1.safetensors").unlink() if shard(folder) else None,
        r"model-1\.safetensors is missing",
    ),
    "tensor not where the index says": (
        lambda folder: (
            rewrite_index(folder, lambda m: m.update(nonsense="model-0.safetensors")) if shard(folder) else None
        ),
        "lacks tensor nonsense",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_sentence(copy, case):
    damage, message = BROKEN[case]
    damage(copy)
    with pytest.raises(BadInputError, match=message) as caught:
        open_checkpoint(copy)
    assert "\n" not in str(caught.value)


def rename(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


PLANNED = {
    "missing tensor": (
        lambda folder: rename(folder, lambda t: t.pop(LM_HEAD)),
        r"lacks tensor lm_head\.weight \(shape \[512, 128\]\)",
    ),
    "wrong shape": (
        lambda folder: rename(folder, lambda t: t.update({LM_HEAD: torch.zeros(7, 7)})),
        r"has shape \[7, 7\], expected \[512, 128\]",
    ),
    "needed tensor of another dtype": (
        lambda folder: rename(folder, lambda t: t.update({LM_HEAD: t[LM_HEAD].to(torch.int8)})),
        "has dtype I8, expected F32, F16 or BF16",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"lacks tokenizer\.json"),
    "wrong family": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'),
        "is a llava checkpoint, not mllama",
    ),
}


@pytest.mark.parametrize("case", PLANNED)
def test_wrong_checkpoints_are_refused_before_work(copy, store, tmp_path, case):
    damage, message = PLANNED[case]
    damage(copy)
    result = vlmconvert("mllama", copy, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    import re

    assert re.search(message, result.output), result.output
    assert not (tmp_path / "out").exists()


def test_both_spellings_give_the_same_blocks(copy, demo, store, tmp_path):
    def in_memory(tensors):
        for name in list(tensors):
            new = name.replace("language_model.lm_head", "lm_head").replace(
                "language_model.model", "model.language_model"
            )
            new = new if new.startswith(("lm_head", "model.")) else f"model.{new}"
            tensors[new] = tensors.pop(name)

    rename(copy, in_memory)
    graphs = []
    for checkpoint, name in ((demo, "hub"), (copy, "memory")):
        output = tmp_path / name
        result = vlmconvert(
            "mllama", checkpoint, "--llm", "fp32", "--vision", "fp32", "-o", output, "--store", store, "--no-validate"
        )
        assert result.exit_code == 0, result.output
        graphs.append({path.name: path.read_bytes() for path in output.glob("openvino_*")})
    assert graphs[0] == graphs[1]


def test_fetch_takes_folders_and_refuses_what_is_neither(demo):
    assert fetch_checkpoint(str(demo)) == (demo, None)
    with pytest.raises(BadInputError, match="is only for hub ids"):
        fetch_checkpoint(str(demo), revision="main")
    with pytest.raises(BadInputError, match="neither a checkpoint folder nor a hub id"):
        fetch_checkpoint("./nowhere")


def test_fetch_asks_the_hub_for_an_id(demo, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(model, **options):
        asked.append((model, options["revision"], options["token"], tuple(options["allow_patterns"])))
        return str(demo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch_checkpoint("org/name", "v1", "secret") == (demo, demo.name)
    # First what a model can be refused by, then the weights of the very same commit.
    (_, first, _, config_patterns), (_, second, _, weight_patterns) = asked
    assert {(model, token) for model, _, token, _ in asked} == {("org/name", "secret")}
    assert (first, second) == ("v1", demo.name)
    assert "*.safetensors" not in config_patterns
    assert "*.safetensors" in weight_patterns
    assert not any(pattern.endswith((".bin", ".py")) for pattern in weight_patterns)


def test_a_wrong_family_is_refused_before_its_weights_are_fetched(demo, monkeypatch):
    import huggingface_hub

    def snapshot_download(_model, **options):
        assert "*.safetensors" not in options["allow_patterns"]
        return str(demo)

    def check(_folder):
        raise BadInputError("not this one")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(BadInputError, match="not this one"):
        fetch_checkpoint("org/name", check=check)


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*_args, **_options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(BadInputError, match=r"org/name could not be fetched.*no connection"):
        fetch_checkpoint("org/name")
