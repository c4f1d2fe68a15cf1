"""The door to the compiled core: which device runs kernels, and on how many threads."""
