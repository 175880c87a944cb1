"""Rows that products take at once, for whoever plans too. No torch here."""

ROW_TILE = 16  # rows of a product whose bits are those of any other: one is filled up to these
MOST_ROWS = 8  # of which kernels of our own keep the sums in registers; they fill nothing up
