"""Training of Medusa heads: texts, cached hidden states, heads alone (Medusa-1), or both (2)."""
