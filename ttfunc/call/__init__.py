"""The model with other weights."""
