"""A process that runs one model of a benchmark and nothing else, so that its memory is the model's."""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from manifests.errors import ConversionError, VlmConvertError
from manifests.io import MANIFEST_NAME, read_manifest

__all__ = ["MeasuredProcess", "Repeat", "Side", "torch_name"]


@dataclass(frozen=True)
class Side:
    """The model that a process runs: an artifact in its runtime, or a checkpoint in PyTorch with transformers.

    Attributes:
        folder: folder of the model; a folder with a manifest is an artifact.
        label: name of the model in tables.
        device: OpenVINO device name; PyTorch always runs on the CPU.
        ov_config: OpenVINO compile options.
        cache_dir: folder where OpenVINO keeps compiled models.
        dtype: data type in which PyTorch computes.
    """

    folder: Path
    label: str
    device: str = "CPU"
    ov_config: Mapping[str, str] = field(default_factory=dict)
    cache_dir: Path | None = None
    dtype: Literal["bf16", "f32"] = "bf16"


@dataclass(frozen=True)
class Opened:
    """The times to read a model and to compile it, in seconds."""

    load_s: float
    compile_s: float


@dataclass(frozen=True)
class Repeat:
    """One measurement.

    Attributes:
        vision_ms: time of the vision encoder for the whole batch.
        first_token_ms: time from the question to the first token of the whole batch.
        per_token_ms: mean time of each further token of the whole batch.
        tokens_per_s: tokens of all answers divided by the time from the question to the last token.
    """

    vision_ms: float
    first_token_ms: float
    per_token_ms: float
    tokens_per_s: float


class MeasuredProcess:
    """A process that runs one model; use it as a context manager.

    Raises:
        VlmConvertError: if opening or running the model raised it in the process.
        ConversionError: if the process ended, or the model failed in any other way.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(side, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()

    def open(self) -> Opened:
        """Open the model."""
        opened: Opened = self._ask("open")
        return opened

    def take(self, inputs: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
        """Send the inputs of two batches of prompts that differ only in their images, as `bench_prompts` makes them."""
        self._ask("take", inputs)

    def measure(self, new_tokens: int) -> Repeat:
        """Measure once: encode the images of the first batch, and answer the second batch.

        Args:
            new_tokens: exact number of tokens of each answer.
        """
        repeat: Repeat = self._ask("measure", new_tokens)
        return repeat

    def peak_memory(self) -> int:
        """Peak resident memory of the process so far, in bytes."""
        size: int = self._ask("peak_memory")
        return size

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((method, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise ConversionError(
                f"the process that measures {self.side.label} ended with code {self._process.exitcode}: "
                "if it ran out of memory, use smaller batches or a larger machine"
            ) from error
        if isinstance(answer, VlmConvertError):
            raise answer
        return answer


def torch_name(folder: Path, dtype: str) -> str:
    """Name of a checkpoint that runs in PyTorch, for tables."""
    return f"{folder.resolve().name} (PyTorch {dtype})"


class _Model(Protocol):
    def open(self) -> Opened: ...

    def answer(
        self, vision: dict[str, np.ndarray], prompt: dict[str, np.ndarray], new_tokens: int
    ) -> tuple[float, float, float]:
        """The times of the vision encoder, until the first token, and until the last token, in seconds."""
        ...


class _Artifact:
    def __init__(self, side: Side) -> None:
        self._side = side

    def open(self) -> Opened:
        import openvino as ov

        from vlmconvert.running.open import open_runner

        start = time.perf_counter()
        # The files are read once more than needed, to measure reading alone: compiling a model reads its files too.
        core = ov.Core()
        for component in read_manifest(self._side.folder).components:
            for record in component.files:
                if record.path.endswith(".xml"):  # ONNX Runtime cannot read a model without compiling it
                    core.read_model(self._side.folder / record.path)
        read = time.perf_counter()
        self._runner = open_runner(self._side.folder, self._side.device, self._side.ov_config, self._side.cache_dir)
        done = time.perf_counter()
        return Opened(read - start, max(0.0, done - read - (read - start)))

    def answer(
        self, vision: dict[str, np.ndarray], prompt: dict[str, np.ndarray], new_tokens: int
    ) -> tuple[float, float, float]:
        start = encoded = time.perf_counter()
        if "pixel_values" in vision:
            self._runner.encode_images(vision)
            encoded = time.perf_counter()
        tokens = self._runner.prefill(prompt)[:, -1].argmax(axis=-1)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens = self._runner.step(tokens)[:, -1].argmax(axis=-1)
        return encoded - start, first - encoded, time.perf_counter() - encoded


class _Torch:
    """A checkpoint with transformers' `generate`; the time outside of the decoder counts as the vision encoder's."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._vision = 0.0

    def open(self) -> Opened:
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self._dtype = torch.bfloat16 if self._side.dtype == "bf16" else torch.float32
        start = time.perf_counter()
        self._model = AutoModelForImageTextToText.from_pretrained(
            self._side.folder, dtype=self._dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
        ).eval()
        decoder = self._model.get_decoder()
        for module in self._model.base_model.children():
            if module is not decoder:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)
        return Opened(time.perf_counter() - start, 0.0)

    def answer(
        self, vision: dict[str, np.ndarray], prompt: dict[str, np.ndarray], new_tokens: int
    ) -> tuple[float, float, float]:
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in prompt.items()}
        inputs = {
            name: value.to(self._dtype) if value.is_floating_point() else value for name, value in tensors.items()
        }
        clock = _Clock()
        self._vision = 0.0
        start = time.perf_counter()
        self._model.generate(
            **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, streamer=clock
        )
        # The streamer gets the prompt first, and then each token.
        return self._vision, clock.times[1] - start, clock.times[new_tokens] - start

    def _enter(self, *_arguments: Any) -> None:
        self._vision -= time.perf_counter()

    def _leave(self, *_arguments: Any) -> None:
        self._vision += time.perf_counter()


class _Clock:
    """A streamer for `generate` that records when it gets the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Session:
    """The methods that the parent process can call."""

    def __init__(self, side: Side) -> None:
        self._model: _Model = _Artifact(side) if (side.folder / MANIFEST_NAME).exists() else _Torch(side)

    def open(self) -> Opened:
        return self._model.open()

    def take(self, inputs: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
        self._vision, self._prompt = inputs

    def measure(self, new_tokens: int) -> Repeat:
        vision, first, whole = self._model.answer(self._vision, self._prompt, new_tokens)
        return Repeat(
            vision_ms=1000 * vision,
            first_token_ms=1000 * first,
            per_token_ms=1000 * (whole - first) / (new_tokens - 1),
            tokens_per_s=self._prompt["input_ids"].shape[0] * new_tokens / whole,
        )

    def peak_memory(self) -> int:
        return _peak_memory()


def _peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes, as the operating system counts it."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    status = Path("/proc/self/status")
    # On Linux, ru_maxrss is inherited through exec, so it includes the memory of the parent process; VmHWM does not.
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(peak[1])
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def _serve(side: Side, pipe: Connection) -> None:
    """Answer the calls of the parent process until it closes the pipe."""
    session = _Session(side)
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = getattr(session, method)(*arguments)
        except VlmConvertError as error:
            answer = error
        except KeyboardInterrupt:
            return
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            answer = ConversionError(f"{side.label} cannot be measured: {type(error).__name__}: {reason}")
        try:
            pipe.send(answer)
        except OSError:
            return
