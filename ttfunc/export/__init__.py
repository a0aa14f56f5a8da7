"""Any rows, in one program."""
