"""Embedding and output head that stay as a GGUF file has them, or are dequantised when loaded.

As they are they have a third to a half of the bytes. The head is then dequantised in each pass, but
where a CPU's kernels multiply with its blocks; of the embedding only the rows of a pass are. The
numbers are the same. No torch here.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType

from offload_rt.config import Exact, RuntimeConfig
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.methods import BLOCKS
from offload_rt.model.formats.stored import Stored, multiplies
from offload_rt.model.layout import compute_dtype

AT_ONCE = 2**25  # numbers of a head that are dequantised at once, in whole tiles of outputs
_TILE = 64


def forms_of_ends(
    checkpoint: Checkpoint, runtime: RuntimeConfig, device: DeviceKind
) -> tuple[Checkpoint, ...]:
    """A model with its ends in each form they may have; where nothing is predicted, first is best.

    It is one form where answers are to be the same whoever drafts, and a library may take another
    kernel for a part of a head than for all of it: which is faster may go by the drafter. On a CPU
    that is where passes may come to be row-invariant, too.

    Args:
        checkpoint: headers of the model.
        runtime: number format it computes in, and whether passes are to be row-invariant.
        device: what computes.
    """
    ends = dict.fromkeys(checkpoint.stored_ends.values())
    if not ends or any(each.form not in BLOCKS for each in ends):
        return (checkpoint,)
    kept = with_stored_ends(checkpoint)
    name = compute_dtype(checkpoint, runtime.dtype)
    head = (checkpoint.head or checkpoint.embedding).name
    direct = device.host_computes and head in kept.stored and multiplies(kept.stored[head], name)
    if device.host_computes:
        alike = runtime.exact is not Exact.OFF
    else:
        alike = runtime.exact is Exact.ON and device.tile_rows > 0
    return (kept,) if direct or alike else (checkpoint, kept)


@lru_cache(maxsize=8)  # what is known of a model is kept by its identity
def with_stored_ends(checkpoint: Checkpoint) -> Checkpoint:
    """The model with quantised ends as they are stored."""
    made = {each: _in_parts(each) for each in checkpoint.stored_ends.values()}
    ends = {name: made[each] for name, each in checkpoint.stored_ends.items()}
    stored: Mapping[str, Stored] = {**checkpoint.stored, **ends}
    return replace(checkpoint, stored=MappingProxyType(stored), stored_ends=MappingProxyType({}))


def head_is_stored(checkpoint: Checkpoint) -> bool:
    """Whether the output head computes as it is stored."""
    return (checkpoint.head or checkpoint.embedding).name in checkpoint.stored


def _in_parts(stored: Stored) -> Stored:
    outputs = max(_TILE, AT_ONCE // stored.inputs // _TILE * _TILE)
    return replace(stored, at_once=min(outputs, stored.outputs))
