"""Medusa heads as a kind of drafter. No torch here."""

from pathlib import Path
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig
from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.pass_cost import PassLoad
from offload_rt.costs.sizes import KERNEL_BYTES
from offload_rt.costs.workload import PlacedModel
from offload_rt.profiling.profile import LayerWork
from offload_rt.profiling.rates import OTHER_KERNELS
from offload_rt.speculative.kind import DraftedRun, DrafterKind, DrafterSeat, DraftMemory, Points

# 2.3 tokens per pass with 63 nodes are on the low side of arXiv:2401.10774, table 1.
_PRIOR: Points = ((1, 0.5), (4, 0.8), (16, 1.1), (63, 1.3))


def _parts(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    """The heads read their weights once, whatever the number of sequences."""
    heads = LayerWork(weight_bytes=drafting.heads_bytes, flops_per_token=drafting.heads_bytes)
    recorded = target.speeds.device.records
    load = PassLoad(layers=(), streamed=(), slots=0, head=heads, recorded=recorded)
    return (DraftPart(times=1, load=load),)


def _memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    """One recording for each number of sequences that are drafted for at once."""
    recorded = len(run.capacities) * OTHER_KERNELS * KERNEL_BYTES if run.device.records else 0
    return DraftMemory(kept_bytes=drafting.heads_bytes + recorded, recorded_bytes=recorded)


def _make(seat: DrafterSeat, draft: DraftConfig) -> "Drafter":
    assert seat.medusa is not None  # as loaded for it
    return seat.medusa.drafter(seat.index)


KIND = DrafterKind(
    label="Medusa heads",
    most_tokens=256,
    make=_make,
    parts=_parts,
    memory=_memory,
    watches=True,
    prior=_PRIOR,
    tree_depth=lambda draft, known: known,
    history=lambda draft: (Path(draft.heads).name,),
    in_memory=lambda draft: (f"{Path(draft.heads).name}, their logits",),
)

if TYPE_CHECKING:
    from offload_rt.speculative.base import Drafter
