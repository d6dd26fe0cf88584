"""Measuring a finished artifact against the checkpoint that it was made from."""
