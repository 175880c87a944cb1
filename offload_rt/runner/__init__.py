"""A network with its weights on a device: rows of tokens in, logits out."""
