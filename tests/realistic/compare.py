"""What 4 bits lose on real weights: a table of our precisions, and of one NNCF call on the whole language model.

    python -m tests.realistic.checkpoint build/realistic
    python -m tests.realistic.compare build/realistic
    python -m tests.realistic.compare build/realistic --row int4-awq --row int4-gptq --calibration scenes

The texts are the conversations that vlmconvert holds out, with their photos, and passages of Python's documentation. Figures are
means over their tokens, along the texts, against the checkpoint in torch; the cosine is the least of an image's features with those of
the checkpoint. Sizes are those of the language model.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from calibration.sources import held_out_texts, load_samples
from passes.validate.comparison import kl_divergence
from passes.validate.model import Model
from vlmconvert.families import load_family
from vlmconvert.running.open import open_runner

LANGUAGE_MODEL = "openvino_language_model"
GROUP, SAMPLES = 64, 64
_PASSAGES, _LETTERS = 12, 1200
FLOAT_VISION = ("--vision", "fp32")
OURS: Mapping[str, tuple[str, ...]] = {
    "int8": ("--llm", "int8", *FLOAT_VISION),
    "int4": ("--llm", "int4", *FLOAT_VISION),
    "int4-awq without scale estimation": ("--llm", "int4-awq", "--no-scale-estimation", *FLOAT_VISION),
    "int4-awq": ("--llm", "int4-awq", *FLOAT_VISION),
    "int4-gptq": ("--llm", "int4-gptq", *FLOAT_VISION),
    "--max-size": ("--max-size", "121.8MB", *FLOAT_VISION),  # the size of int4-gptq
    "vision int8": ("--llm", "fp32", "--vision", "int8"),
    "vision int8-ptq": ("--llm", "fp32", "--vision", "int8-ptq"),
}
NNCF: Mapping[str, Mapping[str, bool]] = {
    "NNCF, AWQ and scale estimation": {"awq": True, "scale_estimation": True},
    "NNCF, GPTQ": {"gptq": True},
    "NNCF, AWQ, scale estimation and GPTQ": {"awq": True, "scale_estimation": True, "gptq": True},
}


@dataclass(frozen=True)
class Text:
    """A text for teacher forcing: the processor's outputs, and from which token on it is judged."""

    kind: str
    processed: dict[str, np.ndarray]
    first: int


@dataclass(frozen=True)
class Loss:
    """Means over tokens: KL divergence in nats, perplexity of the texts, and top-1 agreement."""

    kl: float
    perplexity: float
    agreement: float


@dataclass(frozen=True)
class Expected:
    """What the checkpoint computes: logits [tokens, vocabulary] for the judged tokens of a text, and features of its images."""

    logits: np.ndarray
    features: np.ndarray | None


def texts(folder: Path) -> Iterator[Text]:
    """The held-out texts of a checkpoint's or artifact's processor."""
    family = load_family("llava")
    processor = family.load_processor(folder)
    for sample in held_out_texts():
        asked, said = (
            family.process(processor, [family.prompt(processor, turns, len(sample.images))], [sample.images])
            for turns in (((sample.turns[0][0], None),), sample.turns[:1])
        )
        yield Text("photos" if sample.pictures else "questions", said, asked["input_ids"].shape[1])
    for passage in documentation():
        yield Text("documentation", family.process(processor, [passage]), 1)


def documentation() -> list[str]:
    """Passages of the language reference that comes with Python."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(text for _, text in sorted(topics.items()))
    distance = len(whole) // _PASSAGES
    return [whole[place : place + _LETTERS] for place in range(distance // 2, len(whole), distance)]


def computed(model: Model, text: Text) -> Expected:
    """What a model computes for a text."""
    logits = model.prefill(text.processed)[0, text.first - 1 : -1]
    return Expected(logits, model.handed.get("image_features") if text.kind == "photos" else None)


def expected_of(checkpoint: Path, used: list[Text]) -> list[Expected]:
    """What the checkpoint computes for each text."""
    model = load_family("llava").reference(checkpoint)
    return [computed(model, text) for text in used]


def size_of(artifact: Path) -> int:
    """Bytes of the language model's weights."""
    return (artifact / f"{LANGUAGE_MODEL}.bin").stat().st_size


def losses(reference: list[Expected], artifact: Path, used: list[Text]) -> dict[str, Loss]:
    """What an artifact with `--logits all` loses on each kind of text, and on all of them."""
    runner = open_runner(artifact)
    found: dict[str, list[np.ndarray]] = {}
    for text, expected in zip(used, reference, strict=True):
        row = tokens_of(expected.logits, computed(runner, text).logits, text)
        for kind in (text.kind, "all"):
            found.setdefault(kind, []).append(row)
    return {kind: mean(rows) for kind, rows in found.items()}


def cosine(reference: list[Expected], artifact: Path, used: list[Text]) -> float:
    """The least cosine of an image's features with those of the checkpoint."""
    runner = open_runner(artifact)
    pairs = [
        (expected.features.ravel(), computed(runner, text).features.ravel())
        for text, expected in zip(used, reference, strict=True)
        if expected.features is not None
    ]
    return min(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) for one, other in pairs)


def tokens_of(expected: np.ndarray, logits: np.ndarray, text: Text) -> np.ndarray:
    """[tokens, 3]: KL divergence, negative log-likelihood, and whether the most likely token is the same."""
    tokens = text.processed["input_ids"][0, text.first :]
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(tokens)), tokens]
    return np.stack([kl_divergence(expected, logits), loss, logits.argmax(1) == expected.argmax(1)], 1)


def mean(rows: list[np.ndarray]) -> Loss:
    """The figures over several texts."""
    kl, loss, agreement = np.concatenate(rows).mean(0)
    return Loss(float(kl), float(np.exp(loss)), float(agreement))


def convert(checkpoint: Path, precisions: tuple[str, ...], output: Path, store: Path, *options: str) -> float:
    """Convert in a process of its own; returns the seconds."""
    start = time.monotonic()
    command = [sys.executable, "-m", "vlmconvert", "llava", str(checkpoint), *precisions]
    places = ["-o", str(output), "--store", str(store), "--no-validate", "--logits", "all"]
    subprocess.run([*command, *places, *options], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


class _Recorder:
    """Takes the place of a language model, and keeps what it would have read."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.seen.append({name: np.array(value) for name, value in inputs.items()})
        return {"logits": np.zeros((1, 1, 1), np.float32)}

    def reset(self) -> None:
        """Nothing is kept between prompts."""


def language_inputs(artifact: Path, calibration: str) -> list[dict[str, Any]]:
    """Inputs of the float language model on the samples that vlmconvert calibrates with."""
    runner, family = open_runner(artifact), load_family("llava")
    processor = family.load_processor(artifact)
    recorder = runner.graphs["language_model"] = _Recorder()
    for given in load_samples(calibration, SAMPLES).samples:
        sample = given.without_video()
        images = sample.images
        runner.prefill(family.process(processor, [family.prompt(processor, sample.turns, len(images))], [images]))
    return recorder.seen


def nncf(float_artifact: Path, calibration: str, output: Path, **how: bool) -> float:
    """One NNCF call on the whole language model of a float artifact; returns the seconds."""
    import nncf as library
    import openvino as ov

    shutil.copytree(float_artifact, output)
    model = ov.Core().read_model(float_artifact / f"{LANGUAGE_MODEL}.xml")
    start = time.monotonic()
    with redirect_stdout(sys.stderr):
        made = library.compress_weights(
            model,
            mode=library.CompressWeightsMode.INT4_ASYM,
            group_size=GROUP,
            ratio=1.0,
            dataset=library.Dataset(language_inputs(float_artifact, calibration)),
            subset_size=SAMPLES,
            **how,
        )
    taken = time.monotonic() - start
    for suffix in (".xml", ".bin"):
        (output / f"{LANGUAGE_MODEL}{suffix}").unlink()
    ov.save_model(made, output / f"{LANGUAGE_MODEL}.xml", compress_to_fp16=False)
    return taken


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--row", "rows", multiple=True, type=click.Choice([*OURS, *NNCF]), default=[*OURS, *NNCF])
@click.option("--calibration", default="mixed", show_default=True)
def main(checkpoint: Path, rows: tuple[str, ...], calibration: str) -> None:
    """Print the table."""
    console = Console(stderr=True)
    used = list(texts(checkpoint))
    reference = expected_of(checkpoint, used)
    own = [tokens_of(expected.logits, expected.logits, text) for text, expected in zip(used, reference, strict=True)]
    tokens = sum(map(len, own))
    table = Table(title=f"calibrated on {calibration}; {tokens} tokens, perplexity {mean(own).perplexity:.1f}")
    kinds = sorted({text.kind for text in used})
    for column in ("recipe", "KL", *(f"KL {kind}" for kind in kinds), "perplexity", "top-1", "cosine", "MB", "s"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made: dict[str, Callable[[Path], float]] = {
            name: lambda output, precisions=precisions: convert(
                checkpoint, precisions, output, work / "store", "--calibration", calibration, "--samples", f"{SAMPLES}"
            )
            for name, precisions in OURS.items()
        }
        if set(rows) & set(NNCF):
            convert(checkpoint, ("--llm", "fp32", *FLOAT_VISION), work / "float", work / "store")
        made |= {name: partial(nncf, work / "float", calibration, **how) for name, how in NNCF.items()}
        for name in rows:
            console.print(f"{name} ...")
            output = work / "made"
            seconds = made[name](output)
            found = losses(reference, output, used)
            whole = found["all"]
            row = [f"{whole.kl:.4f}", *(f"{found[kind].kl:.4f}" for kind in kinds)]
            table.add_row(
                name,
                *row,
                f"{whole.perplexity:.2f}",
                f"{whole.agreement:.3f}",
                f"{cosine(reference, output, used):.5f}",
                f"{size_of(output) / 1e6:.1f}",
                f"{seconds:.0f}",
            )
            console.print(f"{name}: KL {whole.kl:.4f}, {seconds:.0f} s")
            shutil.rmtree(output)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
