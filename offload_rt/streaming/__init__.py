"""Weights on their way from home to the device."""
