"""What a draft model with a bounded context sees: the first tokens and the newest ones.

Attention sinks and a recent window, StreamingLLM section 3.2 (arXiv:2309.17453). The tokens seen
are numbered 0, 1, 2, ... without the gap. Keys are never rotated anew. Instead the window stays
where it is while tokens are added, then jumps, and what is seen after a jump is computed again. Its
place depends on the length of the sequence alone, so the same tokens have the same draft, whatever
was drafted before.
"""

from collections.abc import Sequence

from offload_rt.config import SINK_TOKENS

# A jump drops this part of the recent tokens. It costs a prefill of the other three quarters, which
# weighs three rows per token in one pass, and a draft sees seven eighths of the window on average.
JUMP_SHARE = 4


def seen_tokens(ids: Sequence[int], window_tokens: int | None) -> list[int]:
    """The tokens of a sequence that a draft model sees.

    Args:
        ids: the whole sequence.
        window_tokens: at most, more than `SINK_TOKENS`; None: all.
    """
    if window_tokens is None or len(ids) <= window_tokens:
        return list(ids)
    jump = max(1, (window_tokens - SINK_TOKENS) // JUMP_SHARE)
    jumps = -(-(len(ids) - window_tokens) // jump)
    return [*ids[:SINK_TOKENS], *ids[SINK_TOKENS + jumps * jump :]]
