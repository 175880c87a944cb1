"""The target's own module drafts: how it is loaded, and what of the target it is fed."""

from offload_rt.speculative.hidden_drafter import HiddenModule, ModulePlace
from offload_rt.speculative.mtp.checkpoint import open_module
from offload_rt.speculative.mtp.module import load_module


def load(place: ModulePlace) -> HiddenModule:
    """Load the module beside its target: it is fed what leaves the last layer, normed.

    Raises:
        CheckpointError: the family's layer cannot be run so, or the tensors are not its.
    """
    module = load_module(
        open_module(place.checkpoint),
        place.target,
        place.device,
        weights=place.draft.draft_weights,
        chunk_tokens=place.chunk_tokens,
        target_ids=place.target_ids,
    )
    last = place.checkpoint.config.num_layers - 1
    return HiddenModule("mtp", module, place, layers=[last], prepare=place.target.normed)
