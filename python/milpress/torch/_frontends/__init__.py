"""From a module to what coremltools makes of it, by ``torch.export`` or ``torch.jit.trace``."""
