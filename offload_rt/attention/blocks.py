"""How much attention takes at once, for its kernels and for the planner. No torch here."""

# Where flash attention takes any mask (on a CPU), few rows behind few others are attended to with
# one. Else what all of them see comes first, heads of a group together, and then the rest: keys are
# read once per KV head, with a mask once per query head.
# Measured: docs/RESULTS.md, "Attention by parts".
GROUPED_ROWS, GROUPED_FROM = 128, 2048
KEY_BLOCK = 1024  # keys whose scores are written out at once
PIECE = 64  # of these, what rows that are attended to together share (`exact.py`)
TILE = 16  # rows of these, filled up to a multiple
SCORE_BYTES = 8 * 2**20  # written out scores: of as many query rows as fit
