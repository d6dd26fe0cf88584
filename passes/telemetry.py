"""Telemetry: none of the libraries sends usage data. All switches are here, and are set before any library is imported."""

from __future__ import annotations

import os

from passes.compat.openvino import switch_telemetry_off as switch_openvino_off

__all__ = ["VARIABLES", "switch_telemetry_off"]

# Read by the libraries when they are imported. Processes that are started later inherit them.
VARIABLES = {
    "DO_NOT_TRACK": "1",  # the convention of https://donottrack.sh
    "DISABLE_TELEMETRY": "1",  # huggingface_hub, and what is built on it: transformers, datasets
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def switch_telemetry_off() -> None:
    """Keep all libraries in this process, and in those that it starts, from sending usage data."""
    os.environ.update(VARIABLES)
    switch_openvino_off()
