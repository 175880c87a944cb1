"""TriForce: the target drafts for itself over a part of the keys and values."""
