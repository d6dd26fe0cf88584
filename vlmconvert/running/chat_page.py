"""A web page to chat with one artifact, or with two side by side. All browsers share one conversation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from calibration.scenes import Split, draw_scene
from calibration.sources import open_image
from manifests.errors import BadInputError

if TYPE_CHECKING:
    from types import ModuleType

    from vlmconvert.running.chat import Chat, ChatTimings

__all__ = ["chat_page", "load_gradio", "serve"]

_EXAMPLES = 4
# What a visitor may send at once: characters of a question, images with it, and bytes of an image.
_LONGEST = 20_000
_MOST_IMAGES = 16
_LARGEST = 25 * 2**20
# Seconds after which images are removed that visitors have sent, and between two looks for them; all go when the page ends.
_KEPT = (600, 86_400)
_CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.clock { opacity: 0.75; font-size: 13px; font-variant-numeric: tabular-nums; min-height: 22px; }
.window img { max-height: 170px; }
.window button[title="Share"] { display: none; }
.clock * { color: inherit; font-size: inherit; }
"""
# gradio's pages refer to scripts and fonts on other hosts; this policy tells the browser not to load them.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class _OwnFilesOnly:
    """ASGI middleware that adds the content security policy to every response."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def chat_page(chats: Mapping[str, Chat]) -> Any:
    """Make the page as gradio `Blocks`: a window for each chat, and one text box whose question goes to all chats.

    Args:
        chats: title of a window -> its chat.

    Raises:
        BadInputError: if gradio is not installed.
    """
    gr = load_gradio()

    def forget() -> list[Any]:
        for chat in chats.values():
            chat.reset()
        return [[] for _ in chats] + ["" for _ in chats]

    def refuse(why: str) -> NoReturn:
        raise gr.Error(why, duration=5, print_exception=False)

    def answer(message: dict[str, Any], *windows: list[Any]) -> Iterator[list[Any]]:
        prompt, files = message["text"].strip(), message["files"]
        clocks = ["" for _ in chats]
        if not prompt:
            refuse("Type a question about the image.")
        if len(prompt) > _LONGEST:
            refuse(f"A question has at most {_LONGEST} characters.")
        if len(files) > _MOST_IMAGES:
            refuse(f"A question has at most {_MOST_IMAGES} images.")
        turn = [{"role": "user", "content": {"path": file}} for file in files]
        turn.append({"role": "user", "content": escape(prompt, quote=False)})
        shown = [[*window, *turn] for window in windows]

        def update(busy: bool) -> list[Any]:
            box = gr.MultimodalTextbox(value=None, interactive=not busy)
            return [box, gr.Button(interactive=not busy), *shown, *clocks]

        yield update(busy=True)
        try:
            images = [open_image(Path(file)) for file in files]
            # The chats answer one after the other: if they ran at the same time, each would slow the other's timings.
            for index, chat in enumerate(chats.values()):
                said = ""
                pieces = iter(chat.ask(prompt, images))
                try:
                    for piece in pieces:
                        said += piece
                        shown[index] = [
                            *windows[index],
                            *turn,
                            {"role": "assistant", "content": escape(said, quote=False)},
                        ]
                        yield update(busy=True)
                finally:
                    for _ in pieces:  # if the browser leaves, the answer must end before the next one begins
                        pass
                clocks[index] = _clock(chat.timings)
                yield update(busy=True)
        except BadInputError as error:
            gr.Warning(str(error))
        yield update(busy=False)

    with gr.Blocks(title=" | ".join(chats), analytics_enabled=False, delete_cache=_KEPT) as page:
        windows, clocks = [], []
        with gr.Row():
            for name in chats:
                with gr.Column(min_width=300):
                    windows.append(
                        gr.Chatbot(
                            label=name,
                            height=460,
                            render_markdown=False,
                            feedback_options=None,
                            buttons=["copy"],
                            elem_classes="window",
                        )
                    )
                    clocks.append(gr.Markdown(elem_classes="clock"))
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask something, with or without an image",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            autofocus=True,
        )
        clear = gr.Button("New conversation", variant="secondary", size="sm")
        with tempfile.TemporaryDirectory() as folder:  # gradio copies the files
            gr.Examples(_examples(Path(folder)), box, label="Drawn scenes")
        alone = {
            "concurrency_limit": 1,
            "concurrency_id": "chat",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        gr.on([box.submit], answer, [box, *windows], [box, clear, *windows, *clocks], **alone)
        gr.on(
            [clear.click, page.load, *(window.clear for window in windows)], forget, None, [*windows, *clocks], **alone
        )
    return page


def serve(page: Any, port: int) -> str:
    """Start a server for a page, on 127.0.0.1.

    Args:
        page: the gradio `Blocks` that `chat_page` returns.
        port: port of the server; 0 finds a free port.

    Returns:
        The page's address.

    Raises:
        BadInputError: if the port cannot be used.
    """
    gr = load_gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _app, address, _share = page.queue().launch(
            server_name="127.0.0.1",
            server_port=port or None,
            share=False,
            quiet=True,
            ssr_mode=False,
            prevent_thread_lock=True,
            footer_links=[],
            theme=gr.themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="lg", **fonts),
            css=_CSS,
            max_file_size=_LARGEST,
            # A page elsewhere, whose name leads to this machine, is refused by the name.
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
                    Middleware(_OwnFilesOnly),
                ]
            },
        )
    except OSError as error:
        raise BadInputError(f"port {port} cannot be used ({error}): give another port with --port") from error
    return str(address)


def load_gradio() -> ModuleType:
    """Import gradio.

    Raises:
        BadInputError: if gradio is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"the page needs {error.name}, which is not installed: run pip install 'vlmconvert[demo]'"
        ) from None
    return gradio


def _examples(folder: Path) -> list[dict[str, Any]]:
    examples = []
    for index in range(_EXAMPLES):
        scene = draw_scene(Split.TEST, index)
        path = folder / f"{scene.id}.png"
        scene.image.save(path)
        examples.append({"text": scene.questions[0].text, "files": [str(path)]})
    return examples


def _clock(timings: ChatTimings | None) -> str:
    if timings is None:
        return ""
    parts = [f"vision encoder {timings.vision_ms:.1f} ms"] if timings.vision_ms else []
    parts.append(f"first token {timings.first_token_ms:.1f} ms")
    if timings.per_token_ms is not None:
        parts.append(f"then {timings.per_token_ms:.1f} ms/token")
    return " · ".join([*parts, f"{timings.tokens_per_s:.1f} tokens/s"])
