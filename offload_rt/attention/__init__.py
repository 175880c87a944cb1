"""Kernels over rows of keys and values: what caches and networks compute attention with."""
