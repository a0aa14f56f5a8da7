"""The patched weight: an `index_copy` that has not happened yet."""
