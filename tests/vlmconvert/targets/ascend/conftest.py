"""Checkpoints and artifacts for Ascend that tests only read: each is made once."""

from __future__ import annotations

from functools import cache

import pytest

from passes.ascend.msmodelslim import calibrate
from tests.checkpoints import write_checkpoint
from tests.conftest import vlmconvert
from vlmconvert.conversion.helper import Helper


@pytest.fixture(scope="package", autouse=True)
def _shared_msmodelslim(shared_helper):
    """One process for the conversions by msmodelslim: to import it takes longer than they do."""
    run, theirs = Helper.run, Helper()

    def shared(helper, function, *arguments, **options):
        return run(theirs if function is calibrate else helper, function, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Helper, "run", shared)
        yield
    theirs.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, demo):
    """Family -> a small checkpoint; but for mllama's, which is the demo, its weights are random."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def write(family):
        return demo if family == "mllama" else write_checkpoint(root / family, family)

    return write


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, store):
    """Checkpoint -> its artifact, not validated."""
    root = tmp_path_factory.mktemp("ascend")

    @cache
    def convert(source):
        output = root / f"{len(list(root.iterdir()))}"
        result = vlmconvert("convert", source, "--target", "ascend", "--no-validate", "--store", store, "-o", output)
        assert result.exit_code == 0, result.output
        return output

    return convert
