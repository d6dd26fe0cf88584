"""Releases of other packages than those that are installed, each in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["install"]


def install(folder: Path, *requirements: str) -> None:
    """Install packages into a folder, without what they require.

    Raises:
        subprocess.CalledProcessError: if there is none for this Python, or packages cannot be reached.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([*command, *requirements], check=True, capture_output=True)
