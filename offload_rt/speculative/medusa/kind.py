"""Medusa heads as a kind of drafter. No torch here."""

from pathlib import Path

from offload_rt.speculative.kind import DrafterKind, Points

# 2.3 tokens per pass with 63 nodes are on the low side of arXiv:2401.10774, table 1.
_PRIOR: Points = ((1, 0.5), (4, 0.8), (16, 1.1), (63, 1.3))

KIND = DrafterKind(
    label="Medusa heads",
    most_tokens=256,
    prior=_PRIOR,
    tree_depth=lambda draft, known: known,
    history=lambda draft: (Path(draft.heads).name,),
    in_memory=lambda draft: (f"{Path(draft.heads).name}, their logits",),
)
