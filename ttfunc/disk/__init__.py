"""Rows and checkpoints on disk: a file or a folder appears there whole or not at all."""
