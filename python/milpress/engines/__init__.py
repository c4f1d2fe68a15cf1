"""Engines that run a model: the interpreter anywhere, Core ML on a Mac."""
