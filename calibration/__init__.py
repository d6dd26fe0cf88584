"""Calibration: samples from several kinds of source, and the activations that they cause in a model."""
