"""Top-1 routed projection of tokens through a bank of matrices."""
