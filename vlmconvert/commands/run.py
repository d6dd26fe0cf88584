"""`vlmconvert run`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmconvert.commands import at_least

__all__ = ["run"]


@click.command(
    help="""Ask a finished artifact one question; the answer is printed token by token.

    \b
    Example:
      vlmconvert run mllama-openvino-int4-awq-int8-ptq --image scene.png --prompt "What colour is the circle?"
    """
)
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
    """See the help."""
    from vlmconvert.ask import ask

    at_least("max_new_tokens", max_new_tokens, 1)
    for text in ask(folder, image, prompt, max_new_tokens, device):
        click.echo(text, nl=False)
    click.echo()
