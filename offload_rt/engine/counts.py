"""What was drafted and accepted: report, history and controller read it here.

A step tells of the drafts it checked; those nobody checks are told where the text decides them.

Other averages of accepted tokens stay where they are, as they count something else:

- `planning.controller`: tokens and times of the latest steps by draft size; older ones fade.
- `kv.recent_share`: tokens by share of newest rows, in the drafts of one retrieval cache.
- `speculative.triforce`: the last few drafts since that cache was built; it is built anew by them.
- `SelectiveNgramDrafter`: also drafts that were kept back, which no pass has checked.
- `report.RetrievalCounts`: drafts below triforce's drafts, which another model has checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from offload_rt.config import AcceptRule
from offload_rt.planning.yields import Outcome, Tally
from offload_rt.report import RetrievalCounts, Speculation
from offload_rt.speculative.base import Draft, Verdict


@dataclass(frozen=True, slots=True)
class Drafted:
    """What became of a draft.

    Attributes:
        room: tokens its answer had room for behind the root.
    """

    draft: Draft
    verdict: Verdict
    room: int

    def is_cut(self, nodes: int) -> bool:
        """Whether the end of the answer kept it from its size, so that it tells nothing of it."""
        return self.room < nodes and max(self.draft.tree.depths, default=0) >= self.room


@dataclass(slots=True)
class DraftCounts:
    """How drafting went so far in a run.

    Attributes:
        history: the engine's counts by draft size, of all its runs.
        drafted: nodes proposed.
        accepted: nodes kept.
        reached: per depth, drafts that had a node there whose ancestors were all accepted.
        kept: per depth, drafts of which a node was accepted there.
        draft_s: time spent proposing.
        draft_link_bytes: bytes that crossed the link meanwhile.
    """

    history: Tally
    drafted: int = 0
    accepted: int = 0
    reached: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    draft_link_bytes: int = 0

    def add(self, nodes: int, drafted: Sequence[Drafted]) -> list[Outcome]:
        """Count the drafts of a step.

        Args:
            nodes: size that was asked for; 0 asked for none.
            drafted: what became of them, one of each sequence.

        Returns:
            Those that say something of that size.
        """
        outcomes = []
        for one in drafted:
            draft, path = one.draft, one.verdict.path
            self._count(len(draft.tree), len(path), max(draft.tree.depths, default=0))
            if not one.is_cut(nodes):
                size = len(draft.tree)
                outcome = Outcome(
                    drafted=size,
                    path=path,
                    nested=draft.nested,
                    made=draft.made,
                    likely=draft.likely,
                )
                outcomes.append(outcome)
                if nodes:
                    self.history.add(nodes, outcome)
        return outcomes

    def speculation(
        self,
        drafter: str,
        rule: AcceptRule,
        *,
        passes: int,
        later_tokens: int,
        decode_s: float,
        below: Sequence[RetrievalCounts],
    ) -> Speculation:
        """The counts as a report says them.

        Args:
            drafter: its name.
            rule: when a drafted token is accepted.
            passes: of the target, the prompts' included.
            later_tokens: emitted by the passes behind the prompts'.
            decode_s: time those took.
            below: with triforce, the counts below its drafts, of each sequence.
        """
        return Speculation(
            drafter=drafter,
            accept_rule=rule,
            passes=passes,
            drafted=self.drafted,
            accepted=self.accepted,
            acceptance_rate=self.accepted / self.drafted if self.drafted else None,
            tokens_per_pass=later_tokens / (passes - 1) if passes > 1 else None,
            acceptance_per_depth=[
                kept / reached for kept, reached in zip(self.kept, self.reached, strict=True)
            ],
            draft_s=self.draft_s,
            draft_share=self.draft_s / decode_s if self.draft_s and decode_s else None,
            draft_link_bytes=self.draft_link_bytes,
            retrieval=_sum(below) if below else None,
        )

    def _count(self, drafted: int, accepted: int, deepest: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        depth = min(accepted + 1, deepest)
        while len(self.reached) < depth:
            self.reached.append(0)
            self.kept.append(0)
        for level in range(depth):
            self.reached[level] += 1
            self.kept[level] += level < accepted


def _sum(counts: Sequence[RetrievalCounts]) -> RetrievalCounts:
    return RetrievalCounts(
        passes=sum(c.passes for c in counts),
        drafted=sum(c.drafted for c in counts),
        accepted=sum(c.accepted for c in counts),
        builds=sum(c.builds for c in counts),
        newest_builds=sum(c.newest_builds for c in counts),
    )
