"""An EAGLE-3 head as a kind of drafter. No torch here."""

from pathlib import Path
from typing import TYPE_CHECKING

from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.workload import PlacedModel
from offload_rt.speculative.eagle3.checkpoint import HEAD, MIXING
from offload_rt.speculative.kind import DraftedRun, DrafterKind, DraftMemory, Points
from offload_rt.speculative.kind_hidden import (
    hidden_memory,
    hidden_parts,
    hidden_variants,
    make_hidden,
)

if TYPE_CHECKING:
    from offload_rt.speculative.hidden_drafter import HiddenModule, ModulePlace

# Chains: 3.5 tokens a pass with chains of 7 (Llama-3.1-8B, MT-Bench; vLLM issue 26191), and what a
# constant rate of 0.74 a token makes of fewer. Trees: 6.1 tokens a pass of the paper's trees of 60
# nodes for the same model and prompts (arXiv:2503.01840, table 1).
_PRIOR: Points = ((1, 0.74), (2, 1.29), (4, 1.99), (7, 2.5), (60, 5.1))


def _parts(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    assert drafting.checkpoint is not None  # as opened for it
    own_head = HEAD in drafting.checkpoint.tensors
    return hidden_parts(drafting, target, expected, own_head=own_head, once=(MIXING,))


def _memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    assert drafting.checkpoint is not None  # as opened for it
    taps = drafting.checkpoint.tensors[MIXING].shape[1] // drafting.checkpoint.config.hidden_size
    return hidden_memory(drafting, run, taps=taps)


def _load(place: "ModulePlace") -> "HiddenModule":
    from offload_rt.speculative.eagle3.drafter import load

    return load(place)


KIND = DrafterKind(
    label="EAGLE-3 head",
    most_tokens=64,
    make=make_hidden,
    parts=_parts,
    memory=_memory,
    load=_load,
    watches=True,
    prior=_PRIOR,
    variants=hidden_variants,
    tree_depth=lambda draft, known: draft.tree_passes if draft.as_tree else None,
    size=lambda draft: "tree of" if draft.as_tree else "chain of",
    history=lambda draft: (
        Path(draft.module).name,
        str(draft.shape),
        f"weights {draft.draft_weights}",
    ),
    in_memory=lambda draft: ("hidden states of the target",),
)
