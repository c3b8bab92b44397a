"""Questions that take several runs or checkpoints."""
