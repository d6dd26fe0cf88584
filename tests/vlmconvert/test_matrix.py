"""Families, targets and precisions: every ticked cell of README's table is converted here and compared with the checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest

from calibration.inputs import load_processor, prompt_inputs
from calibration.scenes import Split
from calibration.sources import load_samples
from passes.validate.greedy import forced_logits, greedy
from tests.checkpoints import write_checkpoint
from tests.conftest import vlmconvert
from vlmconvert.families import FAMILIES, demo_checkpoint, family_module
from vlmconvert.runtime import Runner

TARGETS = ("openvino", "onnx")
# Precisions of language model and vision encoder -> least cosine of the logits, without their mean, with the checkpoint's.
PRECISIONS = {
    ("fp32", "fp32"): 0.999999,
    ("fp16", "fp16"): 0.99999,
    ("int8", "int8"): 0.998,
    ("int4", "int8"): 0.9,
    ("int4-awq", "int8-ptq"): 0.9,
}
STEPS = 4


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """The checkpoint of a family, prompts, and its own logits along its own answers; made once."""
    made = {}

    def make(family):
        if family not in made:
            checkpoint = demo_checkpoint(family)
            if checkpoint is None:
                checkpoint = write_checkpoint(tmp_path_factory.mktemp("matrix") / "checkpoint", family)
            samples = load_samples("scenes", 4, split=Split.TEST).samples
            images, prompts = [sample.image for sample in samples], [sample.turns[0][0] for sample in samples]
            processed = prompt_inputs(load_processor(checkpoint), images, prompts)
            made[family] = (
                checkpoint,
                processed,
                greedy(family_module(family).reference(checkpoint), processed, [], STEPS),
            )
        return made[family]

    return make


def cosine(one, other):
    one, other = (logits - logits.mean(axis=-1, keepdims=True) for logits in (one, other))
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum()))


@pytest.mark.parametrize("precisions", PRECISIONS, ids="-".join)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell(family, target, precisions, families, store, tmp_path):
    checkpoint, processed, expected = families(family)
    llm, vision = precisions
    options = ("--target", target, "--llm", llm, "--vision", vision, "--samples", 8, "--vision-samples", 8)
    result = vlmconvert(
        family, checkpoint, *options, "--group-size", 32, "-o", tmp_path / "out", "--store", store, "--no-validate"
    )
    assert result.exit_code == 0, result.output
    logits = forced_logits(Runner(tmp_path / "out"), processed, expected.tokens)
    assert cosine(expected.logits, logits) >= PRECISIONS[precisions]


def test_readme_ticks_what_is_tested():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    table = text[text.index("<!-- matrix -->") :].split("\n\n")[1].splitlines()
    columns = [cell.strip() for cell in table[0].strip("|").split("|")][2:]
    ticked = {
        (family, target, tuple(re.findall(r"`([^`]+)`", columns[index])))
        for row in table[2:]
        for family, target, *cells in [[cell.strip(" `") for cell in row.strip("|").split("|")]]
        for index, cell in enumerate(cells)
        if cell == "✓"
    }
    assert ticked == {(family, target, pair) for family in FAMILIES for target in TARGETS for pair in PRECISIONS}
