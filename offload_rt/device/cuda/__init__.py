"""One NVIDIA GPU: the device, its streams, pinned memory, and what the driver tells."""
