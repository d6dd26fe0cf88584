"""What a user's environment says beside the options does not change a byte of an artifact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from manifests.beside import RUN_LOG_NAME
from tests.network import fresh_environment

DEMO = ("llava", "--llm", "int4", "--vision", "fp16", "--workers", "1", "--no-validate", "-o", "out")
ENVIRONMENTS = {
    "plain": {},
    "odd": {
        "PYTHONHASHSEED": "4711",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONOPTIMIZE": "1",
        "LC_ALL": "C",
        "LANG": "tr_TR.UTF-8",
        "LANGUAGE": "tr",
        "TZ": "Asia/Kathmandu",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "40",
        "NO_COLOR": "1",
        "SOURCE_DATE_EPOCH": "1",
    },
}


def converted(place: Path, variables: dict[str, str]) -> dict[str, bytes]:
    """The files of the demo's artifact, converted in an environment of its own."""
    place.mkdir()
    command = [sys.executable, "-m", "vlmconvert", *DEMO, "--store", "store"]
    environment = fresh_environment(place) | variables
    ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    return {path.name: path.read_bytes() for path in (place / "out").iterdir() if path.name != RUN_LOG_NAME}


@pytest.mark.exhaustive
def test_the_environment_changes_no_byte(tmp_path):
    plain, odd = (converted(tmp_path / name, variables) for name, variables in ENVIRONMENTS.items())
    assert plain.keys() == odd.keys()
    assert [name for name in plain if plain[name] != odd[name]] == []
