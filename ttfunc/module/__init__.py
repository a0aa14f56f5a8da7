"""The rows as an nn.Module."""
