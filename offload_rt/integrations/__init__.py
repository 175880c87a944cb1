"""Models of this package in the frameworks of others; each file needs an extra of its own."""
