"""N-grams: phrases of the sequence, and what a model found likely after them."""
