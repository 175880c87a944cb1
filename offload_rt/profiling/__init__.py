"""The machine profile: what this machine's parts can do, measured, stored and looked up."""
