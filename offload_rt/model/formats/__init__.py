"""The forms weights compute in: as they are, reordered, widened, rounded; and their sizes."""
