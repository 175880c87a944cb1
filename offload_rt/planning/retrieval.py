"""Sizes of a retrieval cache: the part of a long context a draft pass reads. No torch here.

The same record sizes the cache (`kv/retrieval.py`) and the plan, so that they cannot differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload_rt.config import DraftConfig, RetrievalConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSizes:
    """What one sequence's retrieval cache takes.

    Rows of a layer, in order: the kept chunks, then the newest tokens, then pending ones.

    Attributes:
        row_bytes: per layer, keys and values of one token.
        config: budget, chunks and how often it is built.
        capacity: tokens of the longest sequence.
        scratch_tokens: spare rows for pending tokens.
    """

    row_bytes: tuple[int, ...]
    config: RetrievalConfig
    capacity: int
    scratch_tokens: int

    def max_chunks(self, recent_share: float) -> int:
        """Chunks there is room for, the pinned first one included.

        Recent tokens begin at the border of a chunk, so there are up to a chunk more of them than
        their share.
        """
        config = self.config
        recent = int(config.budget_tokens * recent_share) + config.chunk_tokens - 1
        return max(1, (config.budget_tokens - recent) // config.chunk_tokens)

    def tail_start(self, length: int, recent_share: float) -> int:
        """Where the recent tokens begin after a build at this length: at the border of a chunk."""
        config = self.config
        if length <= config.budget_tokens:
            return 0  # all of the context fits, in its own order
        chunk = config.chunk_tokens
        recent = config.budget_tokens - self.max_chunks(recent_share) * chunk - (chunk - 1)
        return (length - recent) // chunk * chunk

    @property
    def rows(self) -> int:
        """Rows of a layer; what is generated between two builds enters besides the budget."""
        between_builds = self.config.budget_tokens + self.config.rebuild_tokens
        return min(between_builds, self.capacity) + 2 * self.scratch_tokens

    @property
    def device_bytes(self) -> int:
        """Device memory of this sequence."""
        return self.rows * sum(self.row_bytes)

    @property
    def build_bytes(self) -> int:
        """Device memory a build allocates and frees again: chunks of a block on their way."""
        return 4 * min(self.config.budget_tokens, self.capacity) * max(self.row_bytes)


def retrieval_sizes(draft: DraftConfig, row_bytes: Sequence[int], capacity: int) -> RetrievalSizes:
    """Size the retrieval cache of one sequence.

    Args:
        draft: how much is drafted; pending are the root, a draft, and what is drafted for it.
        row_bytes: per layer, keys and values of one token.
        capacity: tokens of the longest sequence.
    """
    return RetrievalSizes(
        row_bytes=tuple(row_bytes),
        config=draft.retrieval,
        capacity=capacity,
        scratch_tokens=1 + draft.nodes + draft.inner.nodes,
    )
