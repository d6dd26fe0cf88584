"""vlmconvert: convert, compress and check vision-language models."""

import passes  # noqa: F401  libraries send no usage data, and VLMCONVERT_OFFLINE holds, before any of them is imported
from vlmconvert.api import (
    bom,
    check,
    convert,
    evaluate,
    forbid_network,
    load,
    load_processor,
    read_manifest,
    sign,
    verify,
)
from vlmconvert.version import __version__

__all__ = [
    "__version__",
    "bom",
    "check",
    "convert",
    "evaluate",
    "forbid_network",
    "load",
    "load_processor",
    "read_manifest",
    "sign",
    "verify",
]
