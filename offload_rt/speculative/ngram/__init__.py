"""N-grams: phrases of the sequence, and a model's likeliest tokens after them."""
