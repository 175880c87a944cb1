"""Run language models that do not fit in device memory, with exactly their own output."""
