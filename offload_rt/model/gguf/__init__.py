"""Models in GGUF files: the container, its network, its tokenizer; read as they are."""
