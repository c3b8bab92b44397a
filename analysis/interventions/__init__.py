"""What changes when activations are changed: plateaus, patching, ablation, and the replay they share."""
