"""Reading and splitting checkpoints, and the passes that export, compress and validate them."""

import sys

# OpenVINO and NNCF fall back to a stub when their telemetry cannot be imported; nothing that runs here reports home.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
