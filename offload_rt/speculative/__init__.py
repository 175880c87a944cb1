"""Drafting and exact verification: more tokens for each pass over the target."""
