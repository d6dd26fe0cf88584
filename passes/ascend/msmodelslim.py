"""W8A16 weights by msmodelslim's own Calibrator, for users who must ship what Huawei's tool computed.

The Calibrator holds the whole model in memory, and writes tensors under in-memory names, from which they are copied under
on-hub names. `calibrate` must run in a process of its own, because importing msmodelslim changes how all pydantic models of
the process validate and compare.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.architecture import Architecture
from passes.ascend.values import check_finite
from passes.ascend.w8a16 import OFFSET, SCALE, W8A16, CompressW8A16Pass
from passes.checkpoint import Checkpoint
from passes.export.safetensors import CHUNK, Entry, raw_chunks, ring
from passes.header import FLOAT_DTYPES, read_header
from passes.tensor_pass import FLOAT, MadeTensor

if TYPE_CHECKING:
    from torch import nn

__all__ = ["calibrate", "calibrated_tensors", "check_options"]

_FILE = "weights.safetensors"
_GROUP_SIZES = (0, 32, 64, 128, 256)


def check_options(options: CompressW8A16Pass) -> None:
    """Refuse options that msmodelslim does not support.

    Raises:
        BadInputError: if msmodelslim is not installed, or does not support an option.
    """
    for option, given in (
        ("--outlier-suppression", options.outlier_suppression != "none"),
        ("--allow-nonfinite", options.allow_nonfinite),
    ):
        if given:
            raise BadInputError(f"{option} does not go with --engine msmodelslim: leave out one of the two options")
    if options.group_size not in _GROUP_SIZES:
        sizes = ", ".join(map(str, _GROUP_SIZES[1:]))
        raise BadInputError(f"msmodelslim does not support --group-size {options.group_size}: choose {sizes}")
    if importlib.util.find_spec("msmodelslim") is None:
        raise BadInputError(
            "--engine msmodelslim needs a package that is not installed: pip install 'vlmconvert[ascend]', or leave the "
            "option out"
        )


def calibrate(checkpoint: Checkpoint, architecture: Architecture, options: CompressW8A16Pass, output: Path) -> None:
    """Quantize a checkpoint with msmodelslim.

    Args:
        checkpoint: the float checkpoint.
        architecture: names of the checkpoint's tensors and linear layers.
        options: the pass whose options apply.
        output: an existing empty folder for msmodelslim's files.

    Raises:
        BadInputError: if msmodelslim cannot be imported, or a weight is NaN or infinite.
    """
    try:
        from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
    except ImportError as error:
        raise BadInputError(
            f"--engine msmodelslim cannot be used ({error}): install it with pip install 'vlmconvert[ascend]', or leave the option out"
        ) from error
    logging.getLogger("msmodelslim").setLevel(logging.ERROR)
    for name in {architecture.source(name) for name in architecture.shapes}:
        for chunk in raw_chunks(checkpoint.folder, checkpoint.tensors[name], ring(CHUNK)):
            check_finite(checkpoint, name, chunk)
    model = _load(checkpoint.folder)
    others = sorted(set(_linears(model)) - set(architecture.linears))
    groups: dict[str, Any] = {}
    if options.group_size:
        groups = {"is_lowbit": True, "open_outlier": False, "group_size": options.group_size}
    config = QuantConfig(
        w_bit=8, a_bit=16, disable_names=others, disable_last_linear=False, dev_type="cpu", mm_tensor=False, **groups
    )
    calibrator = Calibrator(model, config, calib_data=[], disable_level="L0")
    calibrator.run()
    calibrator.save(str(output), safetensors_name=_FILE, json_name="description.json", save_type=["ascendV1"])


def calibrated_tensors(checkpoint: Checkpoint, architecture: Architecture, folder: Path) -> list[list[MadeTensor]]:
    """The tensors that `calibrate` wrote into `folder`, as `Tensors.made` returns them.

    The folder must exist until the artifact has been written.
    """
    tensors = read_header(folder, _FILE, (*FLOAT_DTYPES, "I8"))

    def made(name: str, on_hub: str, kind: str) -> MadeTensor:
        info = tensors[name]

        def chunks() -> Iterator[memoryview]:
            return (chunk.data for chunk in raw_chunks(folder, info, ring(CHUNK)))

        return MadeTensor(Entry(on_hub, info.dtype, info.shape, info.byte_size), chunks, kind)

    groups = []
    for name in architecture.in_file_order(checkpoint):
        prefix, on_hub = name.removesuffix("weight"), architecture.on_hub[name]
        if f"{prefix}{SCALE}" in tensors:
            ends = (SCALE, OFFSET, "weight")
            groups.append([made(f"{prefix}{end}", f"{on_hub.removesuffix('weight')}{end}", W8A16) for end in ends])
        else:
            groups.append([made(name, on_hub, FLOAT)])
    return groups


def _load(folder: Path) -> nn.Module:
    """Load the model in the checkpoint's own dtype, and untie its LM head: msmodelslim fails on weights of two layers."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True
    ).eval()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return model


def _linears(model: nn.Module) -> list[str]:
    from torch import nn

    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
