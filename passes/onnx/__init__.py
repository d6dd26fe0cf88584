"""ONNX: blocks as ONNX graphs, which are joined and written with their weights in a second file."""
