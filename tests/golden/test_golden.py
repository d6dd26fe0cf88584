"""Nothing that a user gets changes unknowingly: the files of converted demo checkpoints have the recorded hashes."""

from __future__ import annotations

import json

import pytest

from tests.conftest import exhaustive_but
from tests.golden.record import ARTIFACTS, HASHES, convert, file_hashes, versions

pytestmark = pytest.mark.slow

RECORDED = json.loads(HASHES.read_text(encoding="utf-8"))
AGAIN = "if this is meant, run python -m tests.golden.record and say in CHANGELOG.md what changed"


def test_the_libraries_are_those_of_the_record():
    assert versions() == RECORDED["versions"], (
        "tests/golden/hashes.json holds for other versions of the libraries: install those of constraints.txt, or, where those "
        "have changed, run python -m tests.golden.record"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", exhaustive_but([name for name in ARTIFACTS if name.startswith("mllama")], ARTIFACTS))
def test_every_file_is_the_recorded_one(name, place, request):
    if name.startswith("llava-openvino"):  # a tokenizer's graph counts what its process has made before
        request.getfixturevalue("own_helpers")
    assert file_hashes(convert(name, place, place / "store")) == RECORDED["artifacts"][name], AGAIN
