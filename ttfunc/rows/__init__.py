"""What is trained: a pytree of rows."""
