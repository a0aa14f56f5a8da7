"""Where the token matrices of a model are, what is tied to what, and what leads to them."""
