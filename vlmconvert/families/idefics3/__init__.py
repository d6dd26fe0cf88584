"""Idefics3."""
