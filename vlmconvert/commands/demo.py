"""`vlmconvert demo`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmconvert.commands import at_least, device_options, parse_ov_config

__all__ = ["demo"]


@click.command(
    help="""Chat with an artifact in the browser, or with two of them side by side.

    Only this machine can open the page, and the page loads nothing from other hosts. It needs gradio:
    pip install "vlmconvert[demo]"

    \b
    Examples:
      vlmconvert demo mllama-openvino-int4-gptq-int8-ptq
      vlmconvert demo out-fp16 out-int4-awq --port 8080
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option("--port", default=7860, show_default=True, help="Port on 127.0.0.1; 0 finds a free port.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Maximum number of tokens of an answer.")
@device_options
def demo(
    folder: Path,
    other: Path | None,
    port: int,
    max_new_tokens: int,
    device: str,
    ov_config: tuple[str, ...],
    cache_dir: Path | None,
) -> None:
    """See the help."""
    from manifests.errors import BadInputError
    from vlmconvert.running.chat_page import chat_page, load_gradio, serve

    at_least("max_new_tokens", max_new_tokens, 1)
    at_least("port", port, 0)
    load_gradio()
    from vlmconvert.console import Reporter
    from vlmconvert.running.chat import Chat

    folders = [folder] if other is None else [folder, other]
    if other is not None and other.resolve() == folder.resolve():
        raise BadInputError(f"{other} is given twice: give two artifacts, or one")
    names = [item.resolve().name for item in folders]
    if len(set(names)) < len(names):
        names = [str(item) for item in folders]
    options = parse_ov_config(ov_config)
    reporter = Reporter()
    chats = {}
    for name, item in zip(names, folders, strict=True):
        with reporter.stage(f"opening {name}"):
            chats[name] = Chat(item, device, options, cache_dir, max_new_tokens)
    page = chat_page(chats)
    address = serve(page, port)
    reporter.say(f"{address}  (stop with Ctrl-C)")
    page.block_thread()
