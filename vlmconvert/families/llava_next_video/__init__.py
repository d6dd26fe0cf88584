"""LLaVA-NeXT-Video."""
