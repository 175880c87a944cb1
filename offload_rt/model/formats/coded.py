"""Decoding weights that lie in memory in codes (`planes.py`), just before they compute."""

import numpy as np
import torch

from offload_rt.device.compiled import in_parts
from offload_rt.errors import CheckpointError
from offload_rt.model.files import shown
from offload_rt.model.formats.integers import Bring
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.planes import DamagedError, decode
from offload_rt.model.formats.stored import Stored
from offload_rt.model.layout import CODED_PART
from offload_rt.model.packed_files import piece_weights


def bring_coded(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """Coded pieces into `out` [O, I], each in one thread; on the CPU."""
    data, flat = parts[CODED_PART].numpy(), out.view(-1)
    each, whole = piece_weights(stored.numbers), out.dtype is torch.bfloat16

    def some(first: int, last: int) -> None:
        for number in range(first, last):
            piece = data[stored.pieces[number] : stored.pieces[number + 1]]
            target = flat[number * each : (number + 1) * each]
            made = target if whole else torch.empty_like(target, dtype=torch.bfloat16)
            decode(piece, made.view(torch.int16).numpy().view(np.uint16))
            if not whole:
                target.copy_(made)

    try:
        in_parts(some, len(stored.pieces) - 1, 1, torch.get_num_threads())
    except DamagedError as error:
        raise CheckpointError(
            f"{shown(stored.module)}: {error}: the file is damaged, pack the model again"
        ) from error


DECODERS: dict[Form, Bring] = {Form.CODED: bring_coded}
