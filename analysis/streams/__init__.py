"""Vectors of a run in shuffled batches, for training."""
