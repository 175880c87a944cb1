"""Waiting for what another thread or process does."""

import time


def wait_until(holds, limit_s=20.0):
    """Return once this holds; a test that would wait longer fails."""
    until = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(1e-3)
