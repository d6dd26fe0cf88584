"""Client for a server with OpenAI's chat API, such as vllm-ascend: it asks about an image, and measures times."""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import BadInputError, ConversionError
from manifests.files import open_file
from manifests.network import check_reachable

__all__ = ["Answer", "Endpoint"]

_TIMEOUT = 600  # maximum number of seconds between two pieces of an answer
# Maximum number of bytes of an answer with all that is sent with it; a token takes less than a thousand.
_LONGEST = 64 * 2**20
# All parameters are given, because vLLM takes missing ones from the model's generation_config.json.
_GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Does not follow a server to another address, which nobody has asked for."""

    def redirect_request(self, *_arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: text of the answer.
        prompt_tokens: number of tokens of the prompt with its images, as the server counts them.
        new_tokens: number of tokens of the answer, as the server counts them.
        first_s: seconds from sending the question to the first piece of the answer.
        whole_s: seconds from sending the question to the end of the answer.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_s: float
    whole_s: float


@dataclass(frozen=True)
class Endpoint:
    """A server.

    Attributes:
        url: address of the server, such as http://localhost:8000/v1.
        model: name of the model to ask; "" asks the first model that the server lists.
    """

    url: str
    model: str = ""

    def served_model(self) -> str:
        """The name of the model on the server.

        Raises:
            BadInputError: if the server does not say which models it serves.
        """
        if self.model:
            return self.model
        try:
            with _OPENER.open(self._address("models"), timeout=30) as response:
                return str(json.loads(response.read(_LONGEST))["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError, http.client.HTTPException) as error:
            raise BadInputError(
                f"{self.url} does not say which model it serves ({error}): check that the server is running"
            ) from error

    def ask(self, prompt: str, image: Path, max_new_tokens: int, ignore_eos: bool = False) -> Answer:
        """Ask a question about one image, with greedy decoding.

        Args:
            prompt: the question.
            image: file of the image.
            max_new_tokens: maximum number of tokens of the answer.
            ignore_eos: whether the answer has exactly `max_new_tokens` tokens.

        Raises:
            BadInputError: if the image cannot be read.
            ConversionError: if the server refuses the question, or the connection breaks off.
        """
        media_type = mimetypes.guess_type(image.name)[0] or "image/png"
        try:
            with open_file(image) as stream:
                picture = f"data:{media_type};base64,{base64.b64encode(stream.read()).decode()}"
        except OSError as error:
            raise BadInputError(
                f"image {image} cannot be read ({error.strerror or error}): give another file"
            ) from error
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt}]
        body: dict[str, Any] = {
            "model": self.served_model(),
            "messages": [{"role": "user", "content": content}],
            **_GREEDY,
            "max_tokens": max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            body["ignore_eos"] = True
        request = urllib.request.Request(  # noqa: S310  checked in _address
            self._address("chat/completions"), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        pieces: list[str] = []
        first = 0.0
        usage: dict[str, Any] = {}
        try:
            with _OPENER.open(request, timeout=_TIMEOUT) as response:
                for event in _events(response):
                    if "error" in event:
                        raise ConversionError(f"the answer of {self.url} broke off: {_message(event['error'])}")
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or []:
                        piece = (choice.get("delta") or {}).get("content")
                        if piece:
                            first = first or time.perf_counter() - start
                            pieces.append(str(piece))
            prompt_tokens, new_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read(2000).decode(errors="replace").split())
            raise ConversionError(
                f"{self.url} refused the question ({error.code}: {reason}): change the question or the settings of the server"
            ) from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError, http.client.HTTPException) as error:
            raise ConversionError(
                f"the answer of {self.url} broke off ({error}): check that the server is still running"
            ) from error
        whole = time.perf_counter() - start
        if not isinstance(prompt_tokens, int) or not isinstance(new_tokens, int):
            raise ConversionError(
                f"{self.url} does not report numbers of tokens: use a server that supports stream_options.include_usage"
            )
        return Answer("".join(pieces), prompt_tokens, new_tokens, first or whole, whole)

    def _address(self, path: str) -> str:
        if not self.url.startswith(("http://", "https://")):
            raise BadInputError(f"--endpoint {self.url} is not an address: write it as http://localhost:8000/v1")
        check_reachable("endpoint", self.url)
        return f"{self.url.rstrip('/')}/{path}"


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """Yield the JSON content of each server-sent event in a stream.

    Raises:
        ValueError: if the stream is longer than an answer can be, or an event is not JSON.
    """
    size = 0
    while line := response.readline(_LONGEST):
        size += len(line)
        if size > _LONGEST:
            raise ValueError(f"it sends more than {_LONGEST} bytes")
        text = line.decode("utf-8").strip()
        if text.startswith("data:") and text != "data: [DONE]":
            yield json.loads(text.removeprefix("data:"))
