"""`vlmconvert sign`."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["sign"]


@click.command(
    help="""Sign an artifact, so that others can verify where it comes from; no network is needed.

    The signature covers every file that is in the folder, and is written beside them as model.sig. Evaluate and measure the
    artifact first: a file that is added later is refused. It needs model-signing: pip install "vlmconvert[sign]"

    \b
    Examples:
      vlmconvert sign mllama-openvino-int4-gptq-int8-ptq --private-key private.pem
      vlmconvert verify mllama-openvino-int4-gptq-int8-ptq --public-key public.pem

    Exit codes: 0 signed, 1 the artifact is not intact, 2 the folder is not an artifact, or the key cannot be used.
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--private-key",
    type=click.Path(path_type=Path),
    required=True,
    help="PEM file of an elliptic-curve key on P-256, P-384 or P-521, without a password.",
)
def sign(folder: Path, private_key: Path) -> None:
    """See the help."""
    import vlmconvert
    from vlmconvert.console import Reporter

    reporter = Reporter()
    with reporter.stage(f"signing {folder}"):
        signature = vlmconvert.sign(folder, private_key)
    reporter.say(f"{signature}")
