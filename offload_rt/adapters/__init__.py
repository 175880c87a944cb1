"""Adapters (LoRA): read, merged into a model by peft's own code, kept as a file of their own."""
