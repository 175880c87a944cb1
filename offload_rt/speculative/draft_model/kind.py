"""A smaller model as a kind of drafter. No torch here."""

from offload_rt.config import DraftConfig
from offload_rt.speculative.kind import DrafterKind, Points

# Qwen2.5-Coder-1.5B drafted for by its 0.5B, first turns of MT-Bench, greedy, the prompt's pass
# counted (docs/RESULTS.md, "Tokens per pass by draft size").
_PRIOR: Points = ((1, 0.75), (2, 1.35), (4, 2.1), (8, 2.9), (16, 3.7), (64, 5.3), (256, 7.0))


def history(draft: DraftConfig) -> list[str]:
    """How the model is asked, for the name of what was seen of it."""
    shape, window = draft.shape, draft.window_tokens or "full"
    return [str(shape), f"window {window}", f"weights {draft.draft_weights}"]


KIND = DrafterKind(
    label="draft model",
    most_tokens=256,
    prior=_PRIOR,
    below=0.7,
    tree_depth=lambda draft, known: draft.tree_passes if draft.as_tree else None,
    history=history,
    size=lambda draft: "tree of" if draft.as_tree else "chain of",
)
