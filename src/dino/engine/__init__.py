"""The training loop, checkpoints, logging and monitors."""
