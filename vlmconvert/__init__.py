"""vlmconvert: convert, compress and check vision-language models."""

from vlmconvert.api import check, convert, evaluate, load, load_processor, read_manifest, verify
from vlmconvert.version import __version__

__all__ = ["__version__", "check", "convert", "evaluate", "load", "load_processor", "read_manifest", "verify"]
