"""The suite on a device, and Apple's published tables beside it."""
