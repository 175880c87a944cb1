"""Numbers that describe quantised weights, checked when a model is loaded: they are data, too."""

from collections.abc import Iterable

import torch

from offload_rt.errors import CheckpointError
from offload_rt.model.files import shown
from offload_rt.model.formats.integers import codes_of
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored
from offload_rt.model.header import TensorExtent
from offload_rt.model.layout import FLOATS
from offload_rt.model.weight_files import WeightFiles

_INDICES = ("weight_g_idx", "g_idx")


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
            elif word == "qzeros" and each.form is Form.GPTQ:
                _check_zeros(extent, codes_of(files.read(extent), each.bits, each.outputs), each)


def _check_finite(extent: TensorExtent, files: WeightFiles) -> None:
    broken, _ = files.not_finite(extent, torch.float32)
    if broken:
        raise CheckpointError(
            f"{shown(extent.name)} in {extent.path.name} holds {broken} scales that are NaN or "
            "infinite: the file is damaged, download it again"
        )


def _check_zeros(extent: TensorExtent, stored: torch.Tensor, weight: Stored) -> None:
    """Refuse zero points that are one more than codes reach, of which readers make that or 0."""
    largest = (1 << weight.bits) - 1
    if int(stored.max()) == largest:
        raise CheckpointError(
            f"{shown(extent.name)} in {extent.path.name} holds zero points stored as {largest}, "
            "which readers of checkpoint_format gptq read in two ways: convert it to gptq_v2"
        )


def _check_groups(extent: TensorExtent, groups: torch.Tensor, count: int) -> None:
    low, high = (int(number) for number in groups.aminmax())
    if low < 0 or high >= count:
        raise CheckpointError(
            f"{shown(extent.name)} in {extent.path.name} names groups {low} to {high}, there are "
            f"scales of {count}: the file is damaged, download it again"
        )
