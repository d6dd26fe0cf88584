"""Fuzz a reader with Atheris, guided by what the reader's code has covered.

    pip install atheris                                       # not part of the development extra
    python -m tests.fuzz header -max_total_time=60            # or manifest, recipe, pass-line, image, metadata, tsv, coco
    python -m tests.fuzz image build/fuzz/image crash-FILE     # try one input again

New inputs are kept in build/fuzz/TARGET, where the next run goes on. An input that raises anything but `BadInputError` is written to
`crash-...`, one that takes long to `timeout-...`; put it into `tests/hostile/data.py`, or into the seeds in `tests/fuzz/targets.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["calibration", "manifests", "passes", "vlmconvert"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run libFuzzer on the target that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\ntargets: {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    target, seeds = TARGETS[name]
    corpus = Path("build", "fuzz", name)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, "-timeout=10", "-rss_limit_mb=2048", str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
