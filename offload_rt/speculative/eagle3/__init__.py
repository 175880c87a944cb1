"""An EAGLE-3 head: one layer in files of its own, trained on hidden states of a model."""
