"""Calibration: statistics of samples, for weights and activations."""
