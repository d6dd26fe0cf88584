"""Judging an artifact: verifying it against its manifest, and comparing it with a baseline."""
