"""Tuning: the tables, scales and biases of a compressed package, distilled from its original."""
