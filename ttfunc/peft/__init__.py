"""The adapter directories of PEFT, read and written without it."""
