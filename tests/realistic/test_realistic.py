"""What 4 bits lose on real weights; `python -m tests.realistic.compare` prints the whole table."""

from __future__ import annotations

import subprocess

import pytest

from tests.realistic.checkpoint import write_checkpoint
from tests.realistic.compare import Loss, convert, losses, reference_logits, size_of, texts
from vlmconvert.families import load_family

pytestmark = pytest.mark.realistic


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("realistic") / "checkpoint"
    try:
        write_checkpoint(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the packages cannot be had: {(error.stderr or b'').decode()[-300:]}")
    return folder


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory):
    """Precision and calibration source -> what is lost on each kind of text, and the size of the language model."""
    work = tmp_path_factory.mktemp("measured")
    used = list(texts(checkpoint))
    reference = reference_logits(checkpoint, used)

    def measure(llm: str, calibration: str) -> tuple[dict[str, Loss], int]:
        output = work / f"{llm} {calibration}"
        convert(checkpoint, (llm,), output, work / "store", "--calibration", calibration)
        return losses(reference, output, used), size_of(output)

    precisions = [("int8", "mixed"), ("int4-awq", "mixed"), ("int4-gptq", "mixed"), ("int4-gptq", "scenes")]
    return {asked: measure(*asked) for asked in precisions}


def test_gptq_loses_at_most_half_of_what_awq_loses(measured):
    (awq, awq_size), (gptq, gptq_size) = measured["int4-awq", "mixed"], measured["int4-gptq", "mixed"]
    assert gptq["all"].kl <= 0.5 * awq["all"].kl
    assert all(gptq[kind].kl < awq[kind].kl for kind in awq)
    assert gptq["all"].perplexity < awq["all"].perplexity
    assert gptq_size == pytest.approx(awq_size, rel=0.005)


def test_mixed_samples_are_better_than_scenes(measured):
    mixed, scenes = (measured["int4-gptq", source][0] for source in ("mixed", "scenes"))
    assert all(mixed[kind].kl < scenes[kind].kl for kind in mixed)


def test_limits_are_at_least_what_is_usual_and_at_most_three_times_that(measured):
    from vlmconvert.precisions import load_precision

    for precision in ("int8", "int4-awq", "int4-gptq"):
        usual = measured[precision, "mixed"][0]["all"].kl
        assert usual < load_precision(precision).max_kl < 3 * usual


def test_the_vocabulary_has_the_image_token(checkpoint):
    family = load_family("llava")
    processor = family.load_processor(checkpoint)
    assert processor.image_token_id < len(processor.tokenizer)
