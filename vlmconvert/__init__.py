"""vlmconvert turns a Hugging Face vision-language checkpoint into compressed, checked artifacts."""

__version__ = "0.1.0"
