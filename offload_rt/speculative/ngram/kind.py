"""N-grams as a kind of drafter. No torch here."""

from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig
from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.workload import PlacedModel
from offload_rt.speculative.kind import DraftedRun, DrafterKind, DrafterSeat, DraftMemory, Points
from offload_rt.speculative.ngram.suffixes import SHORTEST, lookup_bytes, most_contexts

if TYPE_CHECKING:
    from offload_rt.speculative.base import Drafter

# 0.09, 0.19, 0.28 and 0.45 tokens per step with 4, 8, 16 and 32 nodes; long answers that quote
# accept twice as many (docs/RESULTS.md, "First answers with n-grams"). Nobody knows what will be
# asked, and a draft that is too large costs more than one that is too small.
_PRIOR: Points = ((1, 0.05), (2, 0.07), (4, 0.1), (8, 0.21), (16, 0.31), (32, 0.5), (64, 0.65))

# Seconds of drafting, and for each node, learning included; measured: 9 to 11 us a node
# (docs/RESULTS.md, "Host time of a step").
_LOOKUP_S, _NODE_S = 1e-4, 1e-5


def lookup_s(nodes: int) -> float:
    """Host seconds of a draft of so many nodes, and of learning from its verification."""
    return _LOOKUP_S + nodes * _NODE_S


def _parts(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    return (DraftPart(times=target.sequences, seconds=lookup_s(drafting.config.nodes)),)


def _memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    return DraftMemory(kept_bytes=index_bytes(run, SHORTEST))


def index_bytes(run: DraftedRun, shortest: int) -> int:
    """Bytes of the indexes of tokens; they are in host memory, so only where that is the device's.

    Args:
        run: what is drafted for.
        shortest: number of tokens that are looked up.
    """
    if run.device.own_memory:
        return 0
    return sum(lookup_bytes(capacity, shortest) for capacity in run.capacities)


def _make(seat: DrafterSeat, draft: DraftConfig) -> "Drafter":
    """Of a sequence, with what it has learned there; below another drafter it begins anew."""
    from offload_rt.speculative.ngram.drafter import NgramDrafter, SelectiveNgramDrafter

    kept = None if seat.below else seat.kept[seat.index]
    if kept is not None:
        return kept
    explores = seat.device.kind.rows_are_free and not seat.below
    ngrams = NgramDrafter(draft.nodes, most_contexts(seat.capacity), explores=explores)
    if seat.below:
        return SelectiveNgramDrafter(ngrams, seat.device.kind.worthwhile)
    seat.kept[seat.index] = ngrams
    return ngrams


KIND = DrafterKind(
    label="n-grams",
    most_tokens=64,
    make=_make,
    parts=_parts,
    memory=_memory,
    prior=_PRIOR,
    prior_hits=0.9,  # nothing is known at first
    # How many tokens they give depends on the text more than on anything that is known before it.
    # The controller goes up as soon as it pays. Over 60 simulated answers each, beginning with 8
    # instead of 32 took 2.4 % off where little was accepted and added 5 % where half of the tokens
    # came from drafts.
    first_tokens=8,
    below=0.4,
    automatic=lambda draft, runtime, dtype, prompt_tokens: True,
    tree_depth=lambda draft, known: draft.nodes,
    seen_as="ngram trees",  # what chains gave before says nothing of them
    looks_up=True,
    in_memory=lambda draft: ("where tokens occurred, and what was likely after them",),
)
