"""What samples say of weights and activations."""
