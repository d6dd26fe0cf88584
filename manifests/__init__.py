"""The manifest: its model, reader, writer and verifier; and the error classes that all four packages raise.

A manifest says what an artifact is, what it was made from and how, and how well it does.
"""
