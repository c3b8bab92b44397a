"""Attention with its pattern or statistics on a CPU."""
