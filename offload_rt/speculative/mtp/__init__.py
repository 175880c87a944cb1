"""The module for drafting that a checkpoint carries."""
