"""Compression of blocks by NNCF: weights, and activations too."""
