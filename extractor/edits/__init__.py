"""Edits of activations: their grammar, the places they name, their values, and applying them."""
