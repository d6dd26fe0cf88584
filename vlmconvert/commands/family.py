"""`vlmconvert mllama` and so on: one command for every family."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vlmconvert.commands import at_least
from vlmconvert.families import demo_checkpoint

__all__ = ["family_command"]

_LLM = ("fp32", "fp16", "int8", "int4", "int4-awq")
_VISION = ("fp32", "fp16", "int8", "int8-ptq")


def family_command(family: str) -> click.Command:
    """The command that converts checkpoints of a family."""
    has_demo = demo_checkpoint(family) is not None
    without = "; without it the embedded demo checkpoint is converted" if has_demo else ""
    example = "" if has_demo else "./checkpoint "

    @click.command(
        name=family,
        help=f"""Convert a {family} checkpoint to OpenVINO or ONNX.

        CHECKPOINT is a local folder or a hub id{without}.

        \b
        Examples:
          vlmconvert {family} {example}--llm int4-awq --vision int8-ptq
          vlmconvert {family} ./checkpoint --llm fp16 --vision fp16 -o out --no-validate
          vlmconvert {family} ./checkpoint --calibration ./photos --samples 32 --dry-run
        """,
    )
    @click.argument("checkpoint", required=False)
    @click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Folder to write; named after the model by default."
    )
    @click.option(
        "--target",
        type=click.Choice(("openvino", "onnx")),
        default="openvino",
        show_default=True,
        help="Runtime that the graphs are made for.",
    )
    @click.option(
        "--llm", type=click.Choice(_LLM), default="int4-awq", show_default=True, help="Precision of the language model."
    )
    @click.option(
        "--vision",
        type=click.Choice(_VISION),
        default="int8-ptq",
        show_default=True,
        help="Precision of the vision encoder.",
    )
    @click.option(
        "--group-size",
        default=64,
        show_default=True,
        help="int4: input channels that share a scale, -1 for whole rows.",
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
    @click.option("--revision", help="Branch, tag or commit of a hub id.")
    @click.option("--token", envvar="HF_TOKEN", help="Token for a gated hub id.")
    @click.option("--workers", default=2, show_default=True, help="Processes that compress blocks.")
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
    from dataclasses import fields

    from passes.store import default_store
    from vlmconvert.console import Reporter
    from vlmconvert.convert import Request, convert
    from vlmconvert.plan import Options

    for name in ("vision_samples", "validation_samples", "workers"):
        at_least(name, values[name], 1)
    for name in ("samples", "sequence_length"):
        at_least(name, values[name], 0)
    names = {field.name for field in fields(Options)}
    options = Options(**{name: value for name, value in values.items() if name in names})
    rest = {name: value for name, value in values.items() if name not in names}
    rest["store"] = rest["store"] or default_store()
    _output, passed = convert(Request(family, rest.pop("checkpoint"), options=options, **rest), Reporter())
    if not passed:
        sys.exit(1)
