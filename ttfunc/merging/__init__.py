"""Rows into state dicts, and back."""
