"""Bring Medusa heads to the device, where they stay."""

from collections.abc import Callable

import torch

from offload_rt.device.base import Device
from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.model.files import read_part
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.speculative.medusa.checkpoint import HeadsCheckpoint
from offload_rt.speculative.medusa.heads import MedusaHeads

PURPOSE = "Medusa heads"
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}


def load_heads(
    checkpoint: HeadsCheckpoint,
    device: Device,
    packing: Packing,
    dtype: torch.dtype,
    model_head: Callable[[torch.Tensor], torch.Tensor],
) -> MedusaHeads:
    """Read heads into one buffer of the device.

    Args:
        checkpoint: their headers.
        device: where they go.
        packing: how the buffer is laid out.
        dtype: number format of the model's computation.
        model_head: the model's output head.

    Raises:
        CheckpointError: the files changed, or a number is not finite.
    """
    layout = checkpoint.layout(str(dtype).removeprefix("torch."), packing)
    image = device.allocate(layout.nbytes, PURPOSE)
    files = WeightFiles(checkpoint.files)
    try:
        device.load.copy(image, FileSource(layout, files))
        device.load.record().synchronize()
    finally:
        files.close()
    ours = {stored: name for name, stored in checkpoint.names.stored.items()}
    state = {}
    for placement in layout.placements:
        data = image.tensor[placement.offset : placement.offset + placement.nbytes]
        state[ours[placement.name]] = data.view(dtype).view(placement.shape)
    _check_finite(checkpoint, device, state)
    with torch.device("meta"):
        heads = MedusaHeads(checkpoint.names.shape, model_head)
    heads.load_state_dict(state, assign=True)
    return heads.requires_grad_(False).eval()


def load_token_map(checkpoint: HeadsCheckpoint, device: Device, tokens: int) -> torch.Tensor | None:
    """The token of each row of truncated output heads, [rows] int64 on the device, if they are.

    Args:
        checkpoint: headers of the heads.
        device: where it goes.
        tokens: ids the model knows.

    Raises:
        CheckpointError: it names tokens the model does not know.
    """
    extent = checkpoint.token_map
    if extent is None:
        return None
    data = read_part(checkpoint.folder, extent.path.name, extent.nbytes, extent.offset)
    # Memory of the host, whatever device torch takes for its own just now.
    ids: list[int] = torch.frombuffer(bytearray(data), dtype=_INTEGERS[extent.dtype]).tolist()
    if ids and not (min(ids) >= 0 and max(ids) < tokens):
        raise CheckpointError(
            f"{extent.path}: token_map names tokens from {min(ids)} to {max(ids)}, the model knows "
            f"0 to {tokens - 1}: take heads made for this model"
        )
    return device.upload(ids)


def _check_finite(
    checkpoint: HeadsCheckpoint, device: Device, state: dict[str, torch.Tensor]
) -> None:
    names = list(state)
    good = torch.stack([state[name].isfinite().all() for name in names])
    for name, is_good in zip(names, device.download(good.to(torch.int64)), strict=True):
        if not is_good:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} holds numbers that are not finite: the heads' "
                "training went wrong or the file is damaged, get others"
            )
