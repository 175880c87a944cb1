"""How the drafting of a run went."""

from dataclasses import dataclass, field

from offload_rt.speculative.base import Draft, Verdict


@dataclass(slots=True)
class DraftCounts:
    """How drafting went so far.

    Attributes:
        drafted: nodes proposed.
        accepted: nodes kept.
        reached: per depth, drafts that had a node there whose ancestors were all accepted.
        kept: per depth, drafts of which a node was accepted there.
        draft_s: time spent proposing.
        draft_link_bytes: bytes that crossed the link meanwhile.
    """

    drafted: int = 0
    accepted: int = 0
    reached: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    draft_link_bytes: int = 0

    def add(self, draft: Draft, verdict: Verdict) -> None:
        """Count one draft."""
        self.drafted += len(draft.tree)
        self.accepted += len(verdict.path)
        depth = min(len(verdict.path) + 1, max(draft.tree.depths, default=0))
        while len(self.reached) < depth:
            self.reached.append(0)
            self.kept.append(0)
        for level in range(depth):
            self.reached[level] += 1
            self.kept[level] += level < len(verdict.path)
