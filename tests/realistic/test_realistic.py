"""What 4 bits lose on real weights; `python -m tests.realistic.compare` prints the whole table."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from manifests.io import read_manifest
from tests.realistic.checkpoint import write_checkpoint
from tests.realistic.compare import FLOAT_VISION, Loss, convert, expected_of, losses, size_of, texts
from vlmconvert.families import load_family
from vlmconvert.precisions import load_precision

pytestmark = pytest.mark.realistic


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("realistic") / "checkpoint"
    try:
        write_checkpoint(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the packages cannot be had: {(error.stderr or b'').decode()[-300:]}")
    return folder


@dataclass
class Measured:
    """What precisions lose on each kind of text, and the size of the language model; each is converted once."""

    checkpoint: Path
    work: Path

    def __post_init__(self) -> None:
        self.used = list(texts(self.checkpoint))
        self.expected = expected_of(self.checkpoint, self.used)

    def convert(self, precisions: tuple[str, ...], calibration: str = "mixed") -> Path:
        output = self.work / "-".join((*precisions, calibration))
        if not output.exists():
            options = (*precisions, *FLOAT_VISION)
            convert(self.checkpoint, options, output, self.work / "store", "--calibration", calibration)
        return output

    def __call__(self, llm: str, calibration: str = "mixed") -> tuple[dict[str, Loss], int]:
        output = self.convert(("--llm", llm), calibration)
        return losses(self.expected, output, self.used), size_of(output)


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory):
    return Measured(checkpoint, tmp_path_factory.mktemp("measured"))


def component_sizes(artifact: Path) -> int:
    return sum(file.size for component in read_manifest(artifact).components for file in component.files)


def test_gptq_loses_at_most_half_of_what_awq_loses(measured):
    (awq, awq_size), (gptq, gptq_size) = measured("int4-awq"), measured("int4-gptq")
    assert gptq["all"].kl <= 0.5 * awq["all"].kl
    assert all(gptq[kind].kl < awq[kind].kl for kind in awq)
    assert gptq["all"].perplexity < awq["all"].perplexity
    assert gptq_size == pytest.approx(awq_size, rel=0.005)


def test_formats_by_size_are_better_than_one_format_of_that_size(measured):
    uniform = measured.convert(("--llm", "int4-gptq"))
    fitted = measured.convert(("--max-size", f"{component_sizes(uniform)}"))
    assert 0.98 * component_sizes(uniform) < component_sizes(fitted) <= component_sizes(uniform)
    one, other = (losses(measured.expected, output, measured.used)["all"] for output in (uniform, fitted))
    assert other.kl <= 0.75 * one.kl
    assert other.perplexity < one.perplexity


def test_mixed_samples_are_better_than_scenes(measured):
    mixed, scenes = (measured("int4-gptq", source)[0] for source in ("mixed", "scenes"))
    assert all(mixed[kind].kl < scenes[kind].kl for kind in mixed)


def test_limits_are_at_least_what_is_usual_and_at_most_three_times_that(measured):
    for precision in ("int8", "int4-awq", "int4-gptq"):
        usual = measured(precision)[0]["all"].kl
        assert usual < load_precision(precision).max_kl < 3 * usual


def test_the_vocabulary_has_the_image_token(checkpoint):
    family = load_family("llava")
    processor = family.load_processor(checkpoint)
    assert processor.image_token_id < len(processor.tokenizer)
