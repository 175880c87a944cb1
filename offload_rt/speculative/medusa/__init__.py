"""Medusa heads: their checkpoint formats, their trees, and how often they are right."""
