"""`vlmconvert run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmconvert.commands import at_least, device_options, parse_ov_config
from vlmconvert.commands.streams import checked_text, read_input, read_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from vlmconvert.running.chat import Chat

    # The images of a question, and for each of its videos the frames.
    Shown = tuple[Sequence[Image], Sequence[Sequence[Image]]]

__all__ = ["run"]


@click.command(
    help="""Ask a finished artifact a question; the answer is printed while it is generated, its timings at the end.

    \b
    Examples:
      vlmconvert run mllama-openvino-int4-gptq-int8-ptq --image scene.png --prompt "What colour is the circle?"
      vlmconvert run llama-int4 --image a.jpg --image b.jpg --prompt - < question.txt
      vlmconvert run llama-int4 --image a.jpg --chat
      vlmconvert run llava-next-video-int4 --video clip.mp4 --prompt "What happens?"
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Image to ask about; may be repeated, or left out for a question without an image.",
)
@click.option(
    "--video",
    "videos",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Video to ask about, for models that take videos; may be repeated.",
)
@click.option(
    "--frames",
    default=8,
    show_default=True,
    help="Number of frames that are taken from each video, at equal distances.",
)
@click.option("--prompt", help="The question; - reads the question from standard input.")
@click.option(
    "--chat", is_flag=True, help="Ask further questions: each line of standard input is one, an empty line ends."
)
@click.option("--max-new-tokens", default=256, show_default=True, help="Maximum number of tokens of an answer.")
@device_options
def run(
    folder: Path,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    frames: int,
    prompt: str | None,
    chat: bool,
    max_new_tokens: int,
    device: str,
    ov_config: tuple[str, ...],
    cache_dir: Path | None,
) -> None:
    """See the help."""
    from calibration.sources import open_image
    from calibration.video import read_frames
    from manifests.errors import BadInputError
    from vlmconvert.running.chat import Chat

    at_least("max_new_tokens", max_new_tokens, 1)
    at_least("frames", frames, 1)
    if prompt == "-":
        if chat:
            raise BadInputError(
                "--prompt - and --chat both read standard input: give the first question as --prompt TEXT"
            )
        prompt = read_input()
    elif prompt is not None:
        prompt = checked_text(prompt, "--prompt")
    if not prompt and not chat:
        raise BadInputError("there is no question: give --prompt TEXT, --prompt - or --chat")
    shown: Shown = ([open_image(path) for path in images], [read_frames(path, frames) for path in videos])
    conversation = Chat(folder, device, parse_ov_config(ov_config), cache_dir, max_new_tokens, images_once=True)
    if prompt:
        _answer(conversation, prompt, shown)
        shown = ([], [])
    while chat and (line := _next_line()):
        _answer(conversation, line, shown)
        shown = ([], [])


def _answer(conversation: Chat, prompt: str, shown: Shown) -> None:
    for piece in conversation.ask(prompt, *shown):
        click.echo(piece, nl=False)
    click.echo()
    click.echo(conversation.timings, err=True)


def _next_line() -> str:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    return read_line()
