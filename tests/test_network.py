"""A conversion reaches no other host, and no library in it reports how it is used."""

from __future__ import annotations

import pytest

from passes.telemetry import VARIABLES
from tests.network import observed

DEMO = ("-m", "vlmconvert", "llava", "--llm", "int8", "--vision", "int8-ptq", "--workers", "2")
FEW = ("--calibration", "scenes", "--samples", "2", "--vision-samples", "2", "--validation-samples", "2", "-o", "out")


@pytest.mark.slow
def test_the_main_job_reaches_no_other_host_in_any_process(tmp_path):
    """Without --offline, and with nothing in the environment that turns telemetry off."""
    run = observed((*DEMO, *FEW), tmp_path)
    assert run.code == 0, run.output
    assert run.hosts == []
    imports = [note for note in run.notes if "library" in note]
    assert {note["library"] for note in imports} >= {"huggingface_hub", "nncf", "openvino", "torch", "transformers"}
    assert "openvino_telemetry" not in {note["library"] for note in imports}
    assert len({note["pid"] for note in imports if note["library"] == "openvino"}) >= 3  # the workers, too
    for note in imports:
        assert VARIABLES.items() <= note["environment"].items(), note["library"]


def test_an_attempt_is_refused_and_counted_also_in_a_process_of_its_own(tmp_path):
    attempt = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/')"
    parent = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {attempt!r}]))"
    run = observed(("-c", parent), tmp_path)
    assert (run.code, run.hosts, len(run.processes)) == (1, ["192.0.2.1"], 2)
    assert "no network" in run.output


@pytest.mark.slow
def test_the_libraries_read_that_telemetry_is_off(tmp_path):
    program = """
import passes
from gradio.analytics import analytics_enabled
from huggingface_hub import constants
from ray._common.usage import usage_lib

assert constants.HF_HUB_DISABLE_TELEMETRY and constants.HF_HUB_DISABLE_UPDATE_CHECK
assert not analytics_enabled()
assert not usage_lib.usage_stats_enabled()
"""
    run = observed(("-c", program), tmp_path)
    assert run.code == 0, run.output
    assert run.hosts == []
