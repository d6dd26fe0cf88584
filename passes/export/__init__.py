"""From blocks to one OpenVINO IR: templates, block export, stitching, and the passes on the stitched graph."""
