"""From blocks to one OpenVINO IR: templates, export of blocks, stitching, and passes over the stitched graph."""
