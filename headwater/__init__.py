"""Headwater: GPT-2 activations and attention patterns as sharded Zarr v3 data."""

__version__ = "0.1.0"
