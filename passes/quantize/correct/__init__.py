"""Corrections around quantization: weights before it, biases, norms and scales after it; each a pass of its own."""
