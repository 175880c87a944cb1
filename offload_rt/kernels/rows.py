"""What products take at once, for whoever plans too. No torch here."""

ROW_TILE = 16  # rows of a product whose bits are those of any other: one is filled up to these
MOST_ROWS = 8  # of which kernels of our own keep the sums in registers; they fill nothing up
PANEL = 64  # outputs that a thread takes at once
REGISTER_STEP = 32  # inputs of a matrix register


def fits_registers(inputs: int, outputs: int) -> bool:
    """Whether a bf16 matrix [O, I] is whole parts of what matrix registers take."""
    return not (outputs % PANEL or inputs % REGISTER_STEP)
