"""Evaluation of compressed models: how far they are from their originals."""
