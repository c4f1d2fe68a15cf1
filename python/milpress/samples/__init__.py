"""Samples that a model is run on: arrays, files, pictures, or random numbers."""
