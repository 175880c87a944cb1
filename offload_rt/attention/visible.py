"""Which rows the newest rows of a sequence see."""

import torch

from offload_rt.attention.spec import PendingTree


def visible_rows(
    rows: int,
    keys: range,
    cached: int,
    window: int | None,
    device: torch.device,
    tree: PendingTree | None = None,
) -> torch.Tensor:
    """Return [S, len(keys)] bool: whether each of the newest S rows may look at each of `keys`.

    Args:
        rows: S.
        keys: which of the cached rows, by their place.
        cached: all of them, the newest included.
        window: a row sees itself and this many minus one before it; None: all.
        device: where to make it.
        tree: which of the last rows each query row sees; None: all before it, and itself.
    """
    at = torch.arange(keys.start, keys.stop, device=device, dtype=torch.int32)
    own = torch.arange(cached - rows, cached, device=device, dtype=torch.int32)
    if tree is None:
        visible = at[None, :] <= own[:, None]
    else:
        positions = tree.positions.to(torch.int32)
        own, committed = positions[-rows:], cached - positions.numel()
        first = max(keys.start, committed)  # the first of them that is pending
        pending = slice(first - committed, keys.stop - committed)
        visible = torch.ones(rows, len(keys), dtype=torch.bool, device=device)
        if first < keys.stop:
            at[first - keys.start :] = positions[pending]
            visible[:, first - keys.start :] = tree.visible[:, pending]
    if window is not None:
        visible &= at[None, :] > own[:, None] - window
    return visible
