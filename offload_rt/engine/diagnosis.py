"""Why results are no numbers: one more pass, and a look at the weights of the layer it begins in.

A pass costs nothing extra while results are good; only after a run has failed is it made again,
with every layer watched.
"""

from collections.abc import Callable, Sequence

import torch

from offload_rt.engine.engine import Engine
from offload_rt.errors import NumbersError, WeightsError
from offload_rt.model.files import shown
from offload_rt.model.layout import FLOATS
from offload_rt.runner.tree import TokenTree


def no_token(engine: Engine, index: int, ids: Sequence[int]) -> NumbersError:
    """What to tell of a sequence after which the logits are no numbers; its cache is emptied.

    Args:
        engine: that computed them.
        index: its cache.
        ids: the sequence.
    """
    engine.truncate(index, len(ids) - 1)
    try:
        return not_numbers(engine, lambda: engine.check([(index, ids[-1], TokenTree())])[0])
    finally:
        engine.truncate(index, 0)  # rows that are no numbers must not be found again


def not_numbers(engine: Engine, again: Callable[[], torch.Tensor]) -> NumbersError:
    """What to tell of results that are no numbers.

    Args:
        engine: that computed them.
        again: makes the pass once more; returns its results, [..., N].
    """
    with engine.network.noting_finite() as notes:
        results = again()
    good = torch.stack([*notes, results.amax(dim=-1).isfinite().all()]).tolist()  # host sync
    if all(good):
        return NumbersError(
            "the model's numbers were NaN or infinite, and are not when they are computed again: "
            "run it again, and suspect the memory if that fails too"
        )
    layers = [] if all(good[:-1]) else _suspects(engine, good.index(False))
    where = f"from layer {layers[-1]} on" if layers else "behind the last layer"
    if any(map(engine.network.is_elsewhere, layers)):
        where = f"in or before layer {layers[-1]}, here or on another machine"
    what = f"the model's numbers are NaN or infinite {where}"
    return _of_weights(engine, layers, what) or _of_format(engine.network.dtype, what)


def _suspects(engine: Engine, layer: int) -> list[int]:
    """The layer in which that is first seen, behind those of other machines that it may be from."""
    first = layer
    while first and engine.network.is_elsewhere(first - 1):
        first -= 1
    return [*range(first, layer + 1)]


def _of_weights(engine: Engine, layers: Sequence[int], what: str) -> NumbersError | None:
    """Whether weights are to blame: those of layers, by the files here, and those of none."""
    checkpoint, dtype = engine.checkpoint, engine.network.dtype
    own = [checkpoint.in_files(e) for layer in layers for e in checkpoint.layers[layer]]
    for extent in dict.fromkeys(e for e in (*own, *checkpoint.others) if e.dtype in FLOATS):
        broken, converted = engine.not_finite(extent)
        name = f"{shown(extent.name)} in {extent.path.name}"
        if broken:
            return WeightsError(
                f"{what}: {name} holds {broken} of them, so the file is damaged or the model's "
                "training went wrong: download it again"
            )
        if converted:
            return NumbersError(
                f"{what}: {converted} of the weights of {name} are too large for {_named(dtype)}: "
                "leave --dtype out, or use --dtype float32"
            )
    return None


def _of_format(dtype: torch.dtype, what: str) -> NumbersError:
    largest = torch.finfo(dtype).max
    if dtype is torch.float16:
        return NumbersError(
            f"{what}: they grow beyond {largest:,.0f}, the largest of {_named(dtype)}: use --dtype "
            "float32, or bfloat16"
        )
    return WeightsError(
        f"{what}: they grow beyond {largest:.1e}, the largest of {_named(dtype)}, with weights "
        "that are numbers: the files are damaged or do not belong together, download them again"
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
