"""Samples to batches, the training loop, its checkpoints and runs."""
