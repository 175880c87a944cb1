"""Scripts that the Python of an engine's environment runs; nothing else of offload_rt is there."""
