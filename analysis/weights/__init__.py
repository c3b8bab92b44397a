"""What weights say without text: directions, circuits, and how coherent the tokens of a direction are."""
