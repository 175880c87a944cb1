"""Kernels of our own for few rows on a CPU, assembled by LLVM while a model is loaded."""
