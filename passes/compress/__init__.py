"""Weight compression of blocks and quantization of graphs, through NNCF."""
