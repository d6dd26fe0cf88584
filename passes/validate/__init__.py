"""Measuring a finished artifact against the checkpoint it came from."""
