"""Reading and splitting checkpoints, and the passes that export, compress and validate them."""

from passes.compat.openvino import switch_telemetry_off

switch_telemetry_off()
