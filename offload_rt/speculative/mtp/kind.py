"""A checkpoint's own module for drafting as a kind of drafter. No torch here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.speculative.kind import DrafterKind, Points
from offload_rt.speculative.kind_hidden import (
    hidden_memory,
    hidden_parts,
    hidden_variants,
    make_hidden,
)
from offload_rt.speculative.mtp.checkpoint import find_module

if TYPE_CHECKING:
    from offload_rt.speculative.hidden_drafter import HiddenModule, ModulePlace

# One token: 0.65, the mean of code, prose and questions (Qwen3.8-27B; tenstorrent/vllm issue 442).
# More: accepted by place in chains of 8 on GSM8K, 0.76, 0.62, 0.51, 0.42, 0.36, 0.31, 0.27, 0.24
# (vLLM issue 48892), taken down by what the first of them is above that mean.
_PRIOR: Points = ((1, 0.65), (2, 1.18), (4, 1.98), (8, 2.98))


def _variants(
    draft: DraftConfig, target: Checkpoint, dtype: str, device: DeviceKind
) -> Sequence[DraftConfig]:
    """With the format of its layer chosen; none where the target carries no module."""
    try:
        module = find_module(target)
    except CheckpointError:  # asked for by name it was refused before
        module = None
    return () if module is None else hidden_variants(draft, module, dtype, device)


def _load(place: "ModulePlace") -> "HiddenModule":
    from offload_rt.speculative.mtp.drafter import load

    return load(place)


KIND = DrafterKind(
    label="MTP module",
    most_tokens=64,
    make=make_hidden,
    parts=hidden_parts,
    memory=hidden_memory,
    load=_load,
    watches=True,
    prior=_PRIOR,
    automatic=lambda draft, runtime, dtype, prompt_tokens: True,
    variants=_variants,
    tree_depth=lambda draft, known: draft.tree_passes if draft.as_tree else None,
    size=lambda draft: "tree of" if draft.as_tree else "chain of",
    history=lambda draft: (str(draft.shape), f"weights {draft.draft_weights}"),
    in_memory=lambda draft: ("its layer and KV, hidden states of the target",),
    inside=find_module,
)
