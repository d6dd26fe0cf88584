"""What is wrong is said before any weight is read: shown on a checkpoint whose weights would take minutes to read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

from tests.conftest import vlmconvert
from vlmconvert.families import demo_checkpoint

SIZE = 13_000_000_000  # bytes, of which the disk holds none
READ = 100_000_000  # more than all files but the weights have, and Python's own


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A LLaVA with the shapes of 7 billion parameters; its weights are one hole in a file."""
    folder = tmp_path_factory.mktemp("large")
    demo = demo_checkpoint("llava")
    for path in demo.iterdir():
        if path.suffix in {".json", ".jinja"} and "safetensors" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((demo / "config.json").read_text())
    content["text_config"] |= {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    }
    (folder / "config.json").write_text(json.dumps(content))
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        shapes = {
            name: list(tensor.shape)
            for name, tensor in transformers.LlavaForConditionalGeneration(config).state_dict().items()
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    assert end > SIZE - 1_000_000_000
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return folder


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(
        next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")).split()[1]
    )


@pytest.mark.usefixtures("elsewhere")
def test_a_dry_run_reads_no_weight(checkpoint, store):
    before = bytes_read()
    result = vlmconvert(
        "convert", checkpoint, "--llm", "int4-awq", "--vision", "int8-ptq", "--dry-run", "--store", store
    )
    assert result.exit_code == 0, result.output
    assert "compress-int4-awq" in result.stdout
    assert bytes_read() - before < READ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group-size", "48"), "power of two"),
        (("--llm", "w8a16"), "use fp32"),
        (("--target", "ascend", "--vision", "int8"), "leave the option out"),
        (("-o", "FILLED"), "vlmconvert did not write it"),
        (("-o", "CHECKPOINT", "--force"), "--force does not replace"),
    ],
)
def test_a_mistake_is_said_before_any_weight_is_read(checkpoint, store, tmp_path, options, message):
    (tmp_path / "file").write_text("mine")
    places = {"FILLED": tmp_path, "CHECKPOINT": checkpoint}
    before = bytes_read()
    arguments = [places.get(option, option) for option in options]
    result = vlmconvert("llava", checkpoint, *arguments, "--store", store)
    assert result.exit_code == 2
    assert message in result.output
    assert bytes_read() - before < READ
    assert (tmp_path / "file").read_text() == "mine"
    assert (checkpoint / "model.safetensors").stat().st_size > SIZE - 1_000_000_000
