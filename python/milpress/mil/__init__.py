"""The file format: packages, graphs and weights as Core ML stores them; nothing numeric."""
