"""Where computation happens: one small contract, three machines (CPU, CUDA, simulated)."""
