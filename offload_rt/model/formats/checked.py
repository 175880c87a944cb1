"""Numbers that describe quantised weights, checked when a model is loaded: they are data, too."""

from collections.abc import Iterable

import torch

from offload_rt.errors import CheckpointError
from offload_rt.model.files import shown
from offload_rt.model.formats.stored import Stored
from offload_rt.model.header import TensorExtent
from offload_rt.model.layout import FLOATS
from offload_rt.model.weight_files import WeightFiles

_INDICES = ("weight_g_idx",)


def check_numbers(stored: Iterable[Stored], files: WeightFiles) -> None:
    """Read scales and groups of inputs: about a hundredth of the bytes.

    Args:
        stored: the weights.
        files: they are in.

    Raises:
        CheckpointError: a scale is no number, or an input is in a group that is not there.
    """
    for each in stored:
        for word, extent in each.parts.items():
            if extent.dtype in FLOATS:
                _check_finite(extent, files)
            elif word in _INDICES:
                _check_groups(extent, files.read(extent), each.groups)


def _check_finite(extent: TensorExtent, files: WeightFiles) -> None:
    broken, _ = files.not_finite(extent, torch.float32)
    if broken:
        raise CheckpointError(
            f"{shown(extent.name)} in {extent.path.name} holds {broken} scales that are NaN or "
            "infinite: the file is damaged, download it again"
        )


def _check_groups(extent: TensorExtent, groups: torch.Tensor, count: int) -> None:
    low, high = (int(number) for number in groups.aminmax())
    if low < 0 or high >= count:
        raise CheckpointError(
            f"{shown(extent.name)} in {extent.path.name} names groups {low} to {high}, there are "
            f"scales of {count}: the file is damaged, download it again"
        )
