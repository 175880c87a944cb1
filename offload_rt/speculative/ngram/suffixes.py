"""Last tokens of a sequence that are looked up, and bytes of the indexes of them. No torch here.

That of `drafter.py` holds, for each length, a tuple for every place of a sequence; that
of `followers.py` a model's likeliest tokens after them.
"""

LONGEST, SHORTEST = 4, 1
SHORTEST_QUOTED = 3  # where a draft model decides anyway, rarer and surer ones do
_MOST_CONTEXTS, _CONTEXTS_PER_TOKEN = 16384, 32
_ENTRY_BYTES = 256  # tuple, list, place in the dictionary; measured 130 to 225 with CPython 3.11
_CONTEXT_BYTES = 512  # the same, two arrays more; measured 380


def index_bytes(tokens: int, shortest: int) -> int:
    """Host memory of the index of a sequence."""
    return tokens * (LONGEST - shortest + 1) * _ENTRY_BYTES


def most_contexts(tokens: int) -> int:
    """For how many last tokens the likeliest followers are kept, of a sequence of some length."""
    return min(_MOST_CONTEXTS, _CONTEXTS_PER_TOKEN * tokens)


def lookup_bytes(tokens: int, shortest: int) -> int:
    """Host memory of both indexes of a sequence of some length."""
    return index_bytes(tokens, shortest) + most_contexts(tokens) * _CONTEXT_BYTES
