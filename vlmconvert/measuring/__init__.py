"""Measuring artifacts and checkpoints: speed, answers, descriptions, the error of each block."""
