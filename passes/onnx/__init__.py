"""The ONNX target: blocks as ONNX graphs, joined and written with their weights beside them."""
