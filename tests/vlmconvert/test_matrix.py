"""Families, targets and precisions: every ticked cell of README's table is converted here and compared with the checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.io import read_manifest
from passes.validate.greedy import forced_logits, greedy
from tests.checkpoints import write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.prompts import prompt_inputs
from vlmconvert import load_processor, targets
from vlmconvert.families import FAMILIES, demo_checkpoint, load_family
from vlmconvert.precisions import precision_names
from vlmconvert.running.open import open_runner
from vlmconvert.targets import load_target
from vlmconvert.targets.graph import GraphTarget

TARGETS = tuple(name for name in targets.TARGETS.builtin if isinstance(load_target(name), GraphTarget))
# Without these instructions, sums of two products of 8-bit values saturate at 16 bit.
VNNI = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_vnni", "avx_vnni"))
RANDOM = (
    "llava",
    "llava-next",
    "llava-next-video",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3",
)


def least(mllama, *line):
    return {"mllama": mllama, **dict(zip(RANDOM, line, strict=True))}


# Precisions of language model and vision encoder -> least cosine of the logits, without their mean, with the checkpoint's: a
# little below what is measured, in the order of the families 0.961, 0.986, 0.978, 0.978, 0.934, 0.921, 0.936, 0.973, 0.962, 0.962, 0.969 for int4 and
# 0.9986, 0.9996, 0.991, 0.991, 0.911, 0.880, 0.937, 0.985, 0.953, 0.953, 0.970 for int4-awq. Without VNNI, int8-ptq alone costs llava-next and
# llava-next-video 0.026. A 4-bit model without its last down_proj gives mllama and the LLaVA line 0.848, 0.961, 0.921, 0.921, and one
# in 3 bit 0.880, 0.932, 0.936, 0.936.
PRECISIONS = {
    ("fp32", "fp32"): least(*[0.999999] * 11),
    ("fp16", "fp16"): least(*[0.999999] * 11),
    ("int8", "int8"): least(0.998, 0.999, 0.999, 0.999, 0.998, 0.997, 0.998, 0.999, 0.998, 0.998, 0.999),
    ("int4", "int8"): least(0.955, 0.982, 0.974, 0.974, 0.93, 0.915, 0.93, 0.97, 0.957, 0.957, 0.965),
    ("int4-awq", "int8-ptq"): least(0.998, 0.999, 0.988, 0.988, 0.905, 0.87, 0.93, 0.982, 0.947, 0.947, 0.966)
    if VNNI
    else least(0.998, 0.999, 0.97, 0.97, 0.88, 0.85, 0.9, 0.95, 0.92, 0.92, 0.966),
    ("int4-gptq", "int8"): least(0.998, 0.999, 0.988, 0.988, 0.96, 0.945, 0.977, 0.99, 0.975, 0.975, 0.988),
}
# Precision -> dtype that its weights are stored in, the least share of them that are, and the pass that compressed them.
STORED = {
    "fp32": ("f32", 1, None),
    "fp16": ("f16", 1, None),
    "int8": ("int8", 0.98, "compress-int8"),
    "int8-ptq": ("int8", 0.98, "quantize-int8-ptq"),
    "int4": ("int4", 0.75, "compress-int4"),
    "int4-awq": ("int4", 0.75, "compress-int4-awq"),
    "int4-gptq": ("int4", 0.75, "compress-int4-gptq"),
}
LANGUAGE = ("text_embeddings", "language_model")
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
            images, prompts = [sample.images[0] for sample in samples], [sample.turns[0][0] for sample in samples]
            processed = prompt_inputs(load_processor(checkpoint), images, prompts)
            made[family] = (
                checkpoint,
                processed,
                greedy(load_family(family).reference(checkpoint), processed, [], STEPS),
            )
        return made[family]

    return make


def cosine(one, other):
    one, other = (logits - logits.mean(axis=-1, keepdims=True) for logits in (one, other))
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("precisions", exhaustive_but([("int4-awq", "int8-ptq")], PRECISIONS), ids="-".join)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", exhaustive_but(("llava-next-video", "qwen3-vl", "gemma3"), FAMILIES.names))
def test_cell(family, target, precisions, families, store, tmp_path):
    checkpoint, processed, expected = families(family)
    llm, vision = precisions
    options = ("--target", target, "--llm", llm, "--vision", vision, "--samples", 8, "--vision-samples", 8)
    result = vlmconvert(
        family, checkpoint, *options, "--group-size", 32, "-o", tmp_path / "out", "--store", store, "--no-validate"
    )
    assert result.exit_code == 0, result.output
    logits = forced_logits(open_runner(tmp_path / "out"), processed, expected.tokens)
    assert cosine(expected.logits, logits) >= PRECISIONS[precisions][family]
    assert_stored(read_manifest(tmp_path / "out").components, llm, vision)


def assert_stored(components, llm, vision):
    """Each component is in the precision that was asked for: by the dtypes in its files, and by the passes that made them."""
    assert "language_model" in {component.name for component in components}
    for component in components:
        if not component.weights:
            assert component.name == "vision_resampler"  # an average: nothing to compress
            continue
        asked = llm if component.name in LANGUAGE else vision
        dtype, share, wanted = STORED[asked]
        if component.name == "text_embeddings" and dtype == "int4":
            dtype, share = "int8", 1  # embeddings stay in 8 bit
        assert component.precision == asked
        assert component.weights[dtype] >= share * sum(component.weights.values()), component.weights
        names = [line.partition("{")[0] for line in component.passes]
        made = [name for name in names if name.startswith(("compress-", "quantize-"))]
        assert made == ([wanted] if wanted else []), component.passes
        exported = [line for line in component.passes if line.startswith("export-")]
        assert [line.endswith(f"{{dtype={'f16' if dtype == 'f16' else 'f32'}}}") for line in exported] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("column", PRECISIONS, ids="-".join)
def test_a_cell_in_another_columns_precision_is_seen(column, tmp_path, store):
    """What a column checks refuses the artifacts of all others."""
    options = ("--llm", column[0], "--vision", column[1], "--samples", 4, "--vision-samples", 4, "--group-size", 32)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    result = vlmconvert("llava", checkpoint, *options, "-o", tmp_path / "out", "--store", store, "--no-validate")
    assert result.exit_code == 0, result.output
    components = read_manifest(tmp_path / "out").components
    for other in PRECISIONS:
        if other == column:
            assert_stored(components, *other)
            continue
        # The manifest's word for it is not enough.
        claimed = [
            component.model_copy(update={"precision": other[component.name not in LANGUAGE]})
            for component in components
        ]
        with pytest.raises((AssertionError, KeyError)):
            assert_stored(claimed, *other)


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
    assert ticked == {(family, target, pair) for family in FAMILIES.names for target in TARGETS for pair in PRECISIONS}
    # Every precision of these targets is in a column.
    for side, position in (("language", 0), ("vision", 1)):
        for target in TARGETS:
            assert {pair[position] for pair in PRECISIONS} == set(precision_names(side, target))
