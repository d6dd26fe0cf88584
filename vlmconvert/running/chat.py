"""A conversation with a finished artifact, which streams its answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from threading import Thread
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Chat", "ChatTimings"]


@dataclass(frozen=True)
class ChatTimings:
    """How long one answer took.

    Attributes:
        vision_ms: time of the vision encoder; 0 if the images had been encoded for an earlier turn.
        first_token_ms: time of the language model until the first token.
        per_token_ms: mean time of each further token; None if the answer has one token.
        tokens_per_s: number of tokens divided by the whole time, which includes the vision encoder.
    """

    vision_ms: float
    first_token_ms: float
    per_token_ms: float | None
    tokens_per_s: float

    def __str__(self) -> str:
        rest = "" if self.per_token_ms is None else f", others {self.per_token_ms:.1f} ms"
        return (
            f"vision encoder {self.vision_ms:.1f} ms, first token {self.first_token_ms:.1f} ms{rest}, "
            f"{self.tokens_per_s:.1f} tokens/s"
        )


class Chat:
    """A conversation in turns, each a question and its answer; a question can have images and videos.

    Args:
        folder: the artifact.
        device: OpenVINO device name.
        ov_config: OpenVINO compile options.
        cache_dir: folder where OpenVINO keeps compiled models.
        max_new_tokens: maximum number of tokens of an answer.
        images_once: see `vlmconvert.targets.runner.ArtifactRunner`.

    Raises:
        BadInputError: if the folder is not an artifact, or OpenVINO refuses the device or an option.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
        max_new_tokens: int = 256,
        images_once: bool = False,
    ) -> None:
        from vlmconvert.running.model import VisionLanguageModel

        self._model = VisionLanguageModel(folder, device, ov_config, cache_dir)
        self._model.runner.images_once = images_once
        self._family = self._model.runner.family
        self._processor = self._family.load_processor(folder)
        self._max_new_tokens = max_new_tokens
        self.timings: ChatTimings | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self._messages: list[dict[str, Any]] = []
        self._images: list[Image] = []
        self._videos: list[Sequence[Image]] = []

    def ask(self, prompt: str, images: Sequence[Image] = (), videos: Sequence[Sequence[Image]] = ()) -> Iterator[str]:
        """Ask a question, and yield the answer in pieces of whole characters while it is generated.

        Question and answer become a turn of the conversation when the last piece has been read. Decoding follows the
        artifact's generation config.

        Args:
            prompt: the question.
            images: images of the question.
            videos: videos of the question, each as a sequence of frames.

        Raises:
            BadInputError: if the model takes no videos, or its processor refuses the prompt.
        """
        if videos and self._family.video_token(self._model.runner.config) is None:
            raise BadInputError(f"a {self._family.name} model takes no videos: give images")
        parts = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
        content = [*parts, {"type": "text", "text": prompt}]
        messages = [*self._messages, {"role": "user", "content": content}]
        all_images, all_videos = [*self._images, *images], [*self._videos, *videos]
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        try:
            inputs = self._family.process(self._processor, [text], [all_images], [all_videos], "pt")
        except ValueError as error:
            raise BadInputError(
                f"the processor refuses the prompt ({error}): give one image for each image token in it"
            ) from error
        answer = ""
        for piece in self._stream(inputs):
            answer += piece
            yield piece
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self._messages, self._images, self._videos = [*messages, said], all_images, all_videos

    def _stream(self, inputs: dict[str, Any]) -> Iterator[str]:
        from transformers import TextStreamer

        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.put(text)

        streamer = Streamer(self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def work() -> None:
            try:
                self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, streamer=streamer)
                pieces.put(None)
            except BaseException as error:  # raised again by the generator that yields the answer
                pieces.put(error)

        Thread(target=work, daemon=True).start()
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece
        measured = self._model.runner.timings
        total = measured.vision + measured.first_token + sum(measured.other_tokens)
        self.timings = ChatTimings(
            1000 * measured.vision,
            1000 * measured.first_token,
            1000 * fmean(measured.other_tokens) if measured.other_tokens else None,
            (1 + len(measured.other_tokens)) / total,
        )
