"""The target network: its files, its configuration, its layers."""
