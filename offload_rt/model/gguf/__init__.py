"""Models in GGUF files: the container, its network, its tokenizer; read as they are."""

ENDING = ".gguf"
MANIFEST = "offload_rt_gguf.json"  # in the folder that stands for a model in GGUF files
