"""int4-gptq in a conversion: nearer to the checkpoint than int4-awq, in the graph of int4."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from manifests.io import read_manifest
from tests.conftest import exhaustive_but, vlmconvert
from tests.passes.compress.conftest import SAMPLES

pytestmark = pytest.mark.slow

PLAIN = ("--llm", "int4")
GPTQ = ("--llm", "int4-gptq", "--samples", f"{SAMPLES}")


@pytest.mark.parametrize("family", exhaustive_but(["llava"], ["mllama", "llava"]))
def test_it_loses_at_most_a_quarter_of_what_awq_loses(family, store, tmp_path):
    lost, sizes = {}, {}
    for precision in ("int4-awq", "int4-gptq"):
        options = ("--llm", precision, "--samples", "64", "--vision", "fp32", "--validation-samples", "32")
        result = vlmconvert(family, *options, "--store", store, "-o", tmp_path / precision)
        assert result.exit_code == 0, result.output
        manifest = read_manifest(tmp_path / precision)
        (lost[precision],) = [
            figure.value
            for figure in manifest.validation
            if (figure.metric, figure.component) == ("kl", "language_model")
        ]
        sizes[precision] = sum(file.size for component in manifest.components for file in component.files)
    print(f"{family}: KL {lost}, bytes {sizes}")
    assert lost["int4-gptq"] <= 0.25 * lost["int4-awq"]
    assert sizes["int4-gptq"] == pytest.approx(sizes["int4-awq"], rel=0.005)


def test_the_graph_is_that_of_int4(streamed):
    plain, found = streamed(*PLAIN), streamed(*GPTQ)
    operations, expected = (
        [(node.get_type_name(), node.get_friendly_name(), node.get_output_partial_shape(0)) for node in ordered]
        for ordered in (item.model.get_ordered_ops() for item in (found, plain))
    )
    assert operations == expected
    assert found.int4 == plain.int4
    other = {name for name in plain if plain[name].data.tobytes() != found[name].data.tobytes()}
    assert found.int4 <= other
    parts = {f"{name}/{part}" for name in found.int4 for part in ("scale", "zero_point")}
    # AWQ's factors are folded into the norms in front of the layers, and into the rows of up_proj.
    norms = {name for name in plain if name.endswith("layernorm.weight")}
    assert other <= found.int4 | parts | norms
    assert other & norms


@pytest.mark.exhaustive
def test_layers_in_8_bit_are_those_of_awq(streamed):
    awq, found = (streamed("--llm", llm, *GPTQ[2:], "--ratio", "0.5") for llm in ("int4-awq", "int4-gptq"))
    assert found.int4 == awq.int4
    assert len(found.int4) < len(streamed(*PLAIN).int4)


@pytest.mark.exhaustive
def test_whatever_the_threads_the_bytes_are_equal(tmp_path):
    found = []
    for workers, threads in (("1", "1"), ("1", "4"), ("2", "2")):
        output = tmp_path / f"{workers} {threads}"
        options = ("--llm", "int4-gptq", "--samples", "8", "--vision", "fp16", "--no-validate")
        places = ("--store", tmp_path / f"store {workers} {threads}", "-o", output)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        subprocess.run(
            [sys.executable, "-m", "vlmconvert", "llava", *options, *places, "--workers", workers],
            check=True,
            env=environment,
        )
        found.append({path.name: path.read_bytes() for path in output.iterdir() if path.suffix in {".bin", ".xml"}})
    assert found[0] == found[1] == found[2]


def test_layers_that_few_tokens_reach_are_named(store, tmp_path):
    options = ("llava", "--llm", "int4-gptq", "--dry-run", "--store", store, "-o", tmp_path / "out")
    few = " ".join(vlmconvert(*options, "--samples", "1", "--calibration", "scenes").output.split())
    assert "language_model: about " in few
    assert "are few for the 128 channels of" in few
    assert "of down_proj, which is rounded to the nearest codes, without GPTQ" in few
    assert "are few for" not in vlmconvert(*options).output
