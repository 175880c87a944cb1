"""Runs of anybody, described in a file: what they would take here, and what was published."""
