"""What a model sees, as pictures."""
