"""The peers, run side by side with us: each in its own process, measured with one instrument."""
