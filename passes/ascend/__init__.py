"""W8A16 artifacts for Ascend NPUs: compressing weights, the file format, run plans, checks, and reading them back."""
