"""A small block with what makes compressed weights awkward: odd groups, ragged rows, and AWQ that cannot fold its scale."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from manifests.model import Port
from passes.checkpoint import open_checkpoint
from passes.export.template import BlockSource, Templates, _trace
from passes.onnx.trace import trace_kinds
from passes.vocabulary import Block, Component, Kind


class Awkward(nn.Module):
    """A table look-up, then two layers with SiLU between them; `ids` [batch, sequence] -> [batch, sequence, 24]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, 24, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.fc1(self.table(ids))))


def awkward(_config, width: int, inner: int) -> nn.Module:
    with torch.device("meta"):
        return Awkward(width, inner)


def make(folder, width: int, inner: int) -> tuple[BlockSource, Kind]:
    """A checkpoint of one such block in `folder`, and its traces in both targets."""
    torch.manual_seed(0)
    ids = Port(name="ids", dtype="i64", shape=["batch", "sequence"])
    out = Port(name="out", dtype="f32", shape=["batch", "sequence", 24])
    options = {"width": width, "inner": inner}
    kind = Kind("awkward", f"{__name__}:awkward", (ids,), (out,), {"batch": 2, "sequence": 3}, options)
    module = Awkward(width, inner)
    # Outliers in some channels, so that AWQ has something to scale.
    module.fc1.weight.data[::7] *= 8
    tensors = {name: f"model.block.{name}" for name in module.state_dict()}
    save_file({tensors[name]: value for name, value in module.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "awkward"}))
    traced = kind.make_module({})
    shapes = {name: tuple(parameter.shape) for name, parameter in traced.named_parameters()}
    _trace(kind, traced, folder)
    for file, content in (
        ("names.json", {name: name for name in tensors.values()}),
        ("shapes.json", {"awkward": shapes}),
    ):
        (folder / file).write_text(json.dumps(content))
    block = Block("block", "awkward", {"": "model.block"}, {"ids": "ids"}, {"out": "out"}).bound(shapes)
    component = Component("toy", "language", "toy", {"awkward": kind}, (block,), (ids,), (out,))
    trace_kinds({}, (component,), folder)
    return BlockSource(open_checkpoint(folder), Templates(folder), block), kind


def sample(seed: int) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(seed).integers(0, 50, (2, 9))}
