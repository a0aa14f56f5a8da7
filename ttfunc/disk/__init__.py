"""Rows and checkpoints on disk: what appears there appears whole or not at all."""
