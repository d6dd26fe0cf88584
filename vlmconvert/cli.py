"""The command line. Heavy libraries are imported by the commands, not here, so that --help answers at once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from manifests.errors import VlmConvertError
from vlmconvert import __version__
from vlmconvert.families import FAMILIES

__all__ = ["main"]

_LLM = ("fp32", "fp16", "int8", "int4", "int4-awq")
_VISION = ("fp32", "fp16", "int8", "int8-ptq")


class _Group(click.Group):
    """Turns every expected failure into one sentence and its exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except VlmConvertError as error:
            if context.params.get("debug"):
                traceback.print_exc()
            click.echo(f"vlmconvert: {error}", err=True)
            sys.exit(error.exit_code)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            if context.params.get("debug"):
                traceback.print_exc()
            reason = " ".join(str(error).split()) or type(error).__name__
            click.echo(
                f"vlmconvert: {type(error).__name__}: {reason}; run again as vlmconvert --debug ... for details",
                err=True,
            )
            sys.exit(3)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlmconvert")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def main(debug: bool) -> None:
    r"""Convert a Hugging Face vision-language checkpoint into compressed, checked artifacts.

    \b
    Examples:
      vlmconvert mllama --llm int4-awq --vision int8-ptq
      vlmconvert mllama meta-llama/Llama-3.2-11B-Vision-Instruct -o llama-int4
      vlmconvert run llama-int4 --image photo.jpg --prompt "What is in the image?"

    Exit codes: 0 done, 1 a check failed, 2 bad input, 3 conversion failed.
    """


def _family_command(family: str) -> click.Command:
    @click.command(
        name=family,
        help=f"""Convert a {family} checkpoint to OpenVINO.

        CHECKPOINT is a local folder or a hub id; without it the embedded demo checkpoint is converted.

        \b
        Examples:
          vlmconvert {family} --llm int4-awq --vision int8-ptq
          vlmconvert {family} ./checkpoint --llm fp16 --vision fp16 -o out --no-validate
          vlmconvert {family} ./checkpoint --calibration ./photos --samples 32 --dry-run
        """,
    )
    @click.argument("checkpoint", required=False)
    @click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Folder to write; named after the model by default."
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
    @click.option("--samples", default=64, show_default=True, help="int4-awq: calibration samples.")
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
        help="scenes, a folder of images, or a datasets id[:split].",
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

    for name in ("samples", "vision_samples", "validation_samples", "workers"):
        _at_least(name, values[name], 1)
    _at_least("sequence_length", values["sequence_length"], 0)
    names = {field.name for field in fields(Options)}
    options = Options(**{name: value for name, value in values.items() if name in names})
    rest = {name: value for name, value in values.items() if name not in names}
    rest["store"] = rest["store"] or default_store()
    _output, passed = convert(Request(family, rest.pop("checkpoint"), options=options, **rest), Reporter())
    if not passed:
        sys.exit(1)


def _at_least(name: str, value: int, least: int) -> None:
    from manifests.errors import BadInputError

    if value < least:
        raise BadInputError(f"--{name.replace('_', '-')} {value} is too small: use {least} or more")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "image",
    type=click.Path(path_type=Path),
    help="Image to ask about; leave out for a question in text alone.",
)
@click.option("--prompt", required=True, help="The question.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Most tokens of the answer.")
@click.option("--device", default="CPU", show_default=True, help="OpenVINO device.")
def run(folder: Path, image: Path | None, prompt: str, max_new_tokens: int, device: str) -> None:
    r"""Ask a finished artifact one question; the answer is printed token by token.

    \b
    Example:
      vlmconvert run mllama-openvino-int4-awq-int8-ptq --image scene.png --prompt "What colour is the circle?"
    """
    from vlmconvert.ask import ask

    _at_least("max_new_tokens", max_new_tokens, 1)
    for text in ask(folder, image, prompt, max_new_tokens, device):
        click.echo(text, nl=False)
    click.echo()


_register: Callable[[click.Command], None] = main.add_command
for _family in FAMILIES:
    _register(_family_command(_family))
