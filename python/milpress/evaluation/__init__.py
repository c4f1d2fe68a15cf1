"""How far a compressed model's outputs, and values inside it, are from the original's."""
