"""`vlmconvert mllama` and so on: one command for every family."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmconvert.commands import at_least, parse_size, refuse_options
from vlmconvert.families import demo_checkpoint

if TYPE_CHECKING:
    from vlmconvert.ascend import AscendOptions
    from vlmconvert.plan import Options

__all__ = ["family_command"]

_LLM = ("fp32", "fp16", "int8", "int4", "int4-awq")
_VISION = ("fp32", "fp16", "int8", "int8-ptq")
# Options that only one kind of target has.
_GRAPH = (
    "llm",
    "symmetric",
    "ratio",
    "all_layers",
    "scale_estimation",
    "samples",
    "sequence_length",
    "smooth_quant_alpha",
    "vision_samples",
    "calibration",
    "seed",
    "logits",
)
_ASCEND = ("shard_size", "engine", "allow_nonfinite", "outlier_suppression")


def family_command(family: str) -> click.Command:
    """The command that converts checkpoints of a family."""
    has_demo = demo_checkpoint(family) is not None
    without = "; without it the embedded demo checkpoint is converted" if has_demo else ""
    example = "" if has_demo else "./checkpoint "

    @click.command(
        name=family,
        help=f"""Convert a {family} checkpoint to OpenVINO, ONNX or Ascend.

        CHECKPOINT is a local folder or a hub id{without}.

        \b
        Examples:
          vlmconvert {family} {example}--llm int4-awq --vision int8-ptq
          vlmconvert {family} ./checkpoint --llm fp16 --vision fp16 -o out --no-validate
          vlmconvert {family} ./checkpoint --calibration ./photos --samples 32 --dry-run
          vlmconvert {family} ./checkpoint --target ascend --llm w8a16
        """,
    )
    @click.argument("checkpoint", required=False)
    @click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Folder to write; named after the model by default."
    )
    @click.option(
        "--target",
        type=click.Choice(("openvino", "onnx", "ascend")),
        default="openvino",
        show_default=True,
        help="Runtime that the artifact is made for.",
    )
    @click.option(
        "--llm",
        type=click.Choice((*_LLM, "w8a16")),
        help="Precision of the language model; w8a16 is for ascend.  [default: int4-awq, or w8a16 for ascend]",
    )
    @click.option(
        "--vision",
        type=click.Choice(_VISION),
        help="Precision of the vision encoder.  [default: int8-ptq, or the checkpoint's own float for ascend]",
    )
    @click.option(
        "--group-size",
        type=int,
        help="int4, w8a16: input channels that share a scale, -1 for whole rows.  [default: 64, or -1 for ascend]",
    )
    @click.option("--symmetric", is_flag=True, help="int4, int8: no zero points.")
    @click.option(
        "--ratio",
        default=1.0,
        show_default=True,
        help="int4: most of the weights that go to 4 bit, the least sensitive layers first; the rest is 8 bit.",
    )
    @click.option("--all-layers", is_flag=True, help="int4: embeddings and LM head in 4 bit too.")
    @click.option(
        "--scale-estimation/--no-scale-estimation",
        default=True,
        show_default=True,
        help="int4-awq: scales that make the layers' outputs exact, not the weights.",
    )
    @click.option("--samples", default=64, show_default=True, help="int4-awq: calibration samples, 0 for none.")
    @click.option(
        "--sequence-length", default=0, show_default=True, help="int4-awq: most tokens of a sample, 0 for all."
    )
    @click.option(
        "--smooth-quant-alpha",
        default=0.6,
        show_default=True,
        help="int8-ptq: how much moves from activations to weights.",
    )
    @click.option("--vision-samples", default=100, show_default=True, help="int8-ptq: calibration samples.")
    @click.option(
        "--calibration",
        default="scenes",
        show_default=True,
        help="scenes, a folder, COCO or VQAv2 JSON, TSV, or a datasets id[:split].",
    )
    @click.option("--seed", default=0, show_default=True, help="Which calibration samples.")
    @click.option(
        "--logits",
        type=click.Choice(("last", "all")),
        default="last",
        show_default=True,
        help="Positions that get logits.",
    )
    @click.option("--shard-size", default="4GB", show_default=True, help="ascend: most bytes of tensors in a file.")
    @click.option(
        "--engine",
        type=click.Choice(("vlmconvert", "msmodelslim")),
        default="vlmconvert",
        show_default=True,
        help="ascend: what computes the weights; msmodelslim holds the whole model in memory.",
    )
    @click.option("--allow-nonfinite", is_flag=True, help="ascend: do not refuse NaN and infinity.")
    @click.option(
        "--outlier-suppression",
        type=click.Choice(("none", "equalize")),
        default="none",
        show_default=True,
        help="ascend: equalize takes outlier channels out of the MLPs first; the model stays the same.",
    )
    @click.option("--revision", help="Branch, tag or commit of a hub id.")
    @click.option("--token", envvar="HF_TOKEN", help="Token for a gated hub id.")
    @click.option(
        "--workers",
        default=2,
        show_default=True,
        help="Processes that compress blocks; ascend: weight files that are written at once.",
    )
    @click.option(
        "--store",
        type=click.Path(path_type=Path),
        help="Where finished steps are kept.  [default: ~/.cache/vlmconvert]",
    )
    @click.option("--force", is_flag=True, help="Replace a different result at the output.")
    @click.option("--dry-run", is_flag=True, help="Stop after the plan.")
    @click.option(
        "--validate/--no-validate", default=True, show_default=True, help="Measure the artifact against the checkpoint."
    )
    @click.option("--validation-samples", default=200, show_default=True, help="Held-out scenes to ask about.")
    @click.option("--max-kl", default=1.0, show_default=True, help="Greatest mean KL divergence that passes, in nats.")
    @click.option(
        "--max-drop",
        default=1.0,
        show_default=True,
        help="Greatest loss of accuracy that passes, in percentage points.",
    )
    def command(**values: Any) -> None:
        _convert(family, **values)

    return command


def _convert(family: str, **values: Any) -> None:
    from passes.store import default_store
    from vlmconvert.console import Reporter
    from vlmconvert.convert import Request, convert

    for name in ("vision_samples", "validation_samples", "workers"):
        at_least(name, values[name], 1)
    for name in ("samples", "sequence_length"):
        at_least(name, values[name], 0)
    target = values.pop("target")
    _check_target(target, values["llm"])
    values = {name: value for name, value in values.items() if value is not None}
    graph, ascend = ({name: values.pop(name) for name in names if name in values} for names in (_GRAPH, _ASCEND))
    common = {name: values.pop(name) for name in ("vision", "group_size") if name in values}
    options = _ascend_options(values["workers"], **ascend, **common) if target == "ascend" else None
    values.setdefault("store", default_store())
    values["model"] = values.pop("checkpoint", None)
    request = Request(family, options or _graph_options(target, **graph, **common), **values)
    _output, passed = convert(request, Reporter())
    if not passed:
        sys.exit(1)


def _check_target(target: str, llm: str | None) -> None:
    """Refuse a precision, or an option that was typed, if it does not go with the target."""
    from manifests.errors import BadInputError

    if llm is not None and (llm == "w8a16") != (target == "ascend"):
        fitting = "w8a16" if target == "ascend" else ", ".join(_LLM)
        raise BadInputError(f"--llm {llm} does not go with --target {target}: use {fitting}")
    others = [name for name in (*_GRAPH, "store") if name != "llm"] if target == "ascend" else _ASCEND
    refuse_options(others, f"--target {target}")


def _graph_options(target: Any, **values: Any) -> Options:
    from vlmconvert.plan import Options

    return Options(target=target, **values)


def _ascend_options(
    workers: int,
    shard_size: str,
    engine: Any,
    allow_nonfinite: bool,
    outlier_suppression: str,
    vision: str = "",
    group_size: int = -1,
) -> AscendOptions:
    from passes.compress.w8a16 import CompressW8A16Pass
    from vlmconvert.ascend import AscendOptions

    at_least("group_size", group_size, -1)
    quantize = CompressW8A16Pass(max(group_size, 0), allow_nonfinite, outlier_suppression)
    return AscendOptions(quantize, engine, parse_size("shard_size", shard_size), workers, vision)
