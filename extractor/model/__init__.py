"""Weights, where they come from, and the forward pass with its taps."""
