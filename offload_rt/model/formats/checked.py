"""Numbers that describe quantised weights, checked when a model is loaded: they are data, too."""

from collections.abc import Iterable

import torch

from offload_rt.errors import CheckpointError
from offload_rt.model.files import shown
from offload_rt.model.formats.integers import codes_of
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored
from offload_rt.model.header import TensorExtent
from offload_rt.model.layout import CODED_PART, FLOATS
from offload_rt.model.weight_files import WeightFiles

INDICES = ("weight_g_idx", "g_idx")
_NUMBERS = ("weight", "weight_packed", "qweight", CODED_PART)  # of weights themselves: any will do
_DIVISOR = "weight_global_scale"
_NO_POWER = 255


def check_numbers(stored: Iterable[Stored], files: WeightFiles) -> frozenset[Stored]:
    """Read scales and groups of inputs: a hundredth of the bytes, in FP4 a ninth.

    Args:
        stored: the weights.
        files: they are in.

    Returns:
        weights of which inputs of a group follow each other, as far as an index says which are.

    Raises:
        CheckpointError: a scale is no number, or an input is in a group that is not there.
    """
    in_order = set()
    for each in (one for one in stored if not one.rounds):  # else scales are made, and checked
        for word, extent in each.parts.items():
            if word in _NUMBERS:
                continue
            if extent.dtype in FLOATS:
                _check_finite(extent, files)
            elif word in INDICES:
                groups = files.read(extent)
                _check_groups(extent, groups, each.groups)
                if torch.equal(groups.long(), torch.arange(each.inputs) // each.group):
                    in_order.add(each)
            elif word == "qzeros" and each.form is Form.GPTQ:
                _check_zeros(extent, codes_of(files.read(extent), each.bits, each.outputs), each)
            elif word.startswith("weight_scale"):
                _check_bytes(extent, files.read(extent))
        if _DIVISOR in each.parts and not files.read(each.parts[_DIVISOR]).all():
            raise CheckpointError(
                f"{shown(each.parts[_DIVISOR].name)} is 0, and scales are divided by it: the file "
                "is damaged, download it again"
            )
    return frozenset(in_order)


def _check_bytes(extent: TensorExtent, scales: torch.Tensor) -> None:
    """Refuse scales of 8 bits that are no numbers: of FP8 two codes, of exponents one."""
    wrong = scales == _NO_POWER if scales.dtype is torch.uint8 else scales.float().isnan()
    _refuse_broken(extent, int(wrong.sum()))


def _check_finite(extent: TensorExtent, files: WeightFiles) -> None:
    _refuse_broken(extent, files.not_finite(extent, torch.float32)[0])


def _refuse_broken(extent: TensorExtent, broken: int) -> None:
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
