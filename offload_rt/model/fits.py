"""What the probe found of a family's modules, kept from run to run.

The probe's pass computes shapes by code that imports torch's compiler and sympy: 80 MiB and 1.2 s
of processor time (docs/RESULTS.md, "Memory beside the device memory"). Its verdict depends on the
class, the number format, the configuration, and on the code that is asked and that asks. So it is
kept under a digest of all of these, of transformers' own classes only; refusals are found anew.
A program that has us as a library has imported the compiler with transformers, and asks each time.
What is imported counts as a run's memory once its device is open, so `prepare` comes before that.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from offload_rt.entries import read_entries, write_entries
from offload_rt.folders import cache_folder
from offload_rt.kv.base import KVShape
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.config import ModelConfig
from offload_rt.model.layout import compute_dtype
from offload_rt.model.mixing import Mixer
from offload_rt.model.sparing import is_spared

_FILE = "fits.json"
_MOST_ENTRIES = 64
_COMPUTES_SHAPES = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes")
_OURS = ("probe", "probe_states", "mixing", "attention_function", "experts", "fits")


@dataclass(frozen=True, slots=True)
class Fit:
    """What layers keep of a sequence, and who computes their experts.

    Attributes:
        kv: keys and values of each layer, `NO_KV` where it does not attend.
        experts: modules whose experts the registered function computes, by name, and to how many
            of them a row is sent.
        mixers: what has a state.
        in_tuples: layers return their rows in a tuple of that length; 0: alone.
    """

    kv: tuple[KVShape, ...]
    experts: Mapping[str, int]
    mixers: tuple[Mixer, ...] = ()
    in_tuples: int = 0


def fit_key(config: ModelConfig, dtype: torch.dtype) -> str:
    """What a verdict belongs to."""
    raw = config.raw if config.whole is None else config.whole
    parts = [
        json.dumps([config.model_type, config.part_of, raw], sort_keys=True, default=dict),
        str(dtype),
        torch.__version__,
        transformers.__version__,
        *_ours(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _ours() -> tuple[str, ...]:
    """Digests of the code that asks."""
    files = (Path(__file__).with_name(f"{name}.py") for name in _OURS)
    return tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


def prepare(models: Sequence[Checkpoint], dtype: str) -> None:
    """Import now what the probe of one of these models will; nothing where none needs it.

    Args:
        models: that a run will build.
        dtype: of the computation, as it was asked for.
    """
    for model in models if is_spared() else ():
        name = compute_dtype(model.config.dtype, model.tensors.values(), dtype)
        if kept_fit(fit_key(model.config, getattr(torch, name))) is None:
            for module in _COMPUTES_SHAPES:
                import_module(module)


def kept_fit(key: str) -> Fit | None:
    """What an earlier run found."""
    return read_entries(cache_folder() / _FILE, _parsed).get(key)


def keep_fit(key: str, fit: Fit) -> None:
    """Keep what was found for runs to come."""
    path = cache_folder() / _FILE
    entries = {name: asdict(each) for name, each in read_entries(path, _parsed).items()}
    write_entries(path, entries | {key: asdict(fit)}, _MOST_ENTRIES)


def _parsed(raw: Any) -> Fit:  # noqa: ANN401
    return Fit(
        tuple(KVShape(**shape) for shape in raw["kv"]),
        {str(name): int(count) for name, count in raw["experts"].items()},
        tuple(Mixer(**mixer) for mixer in raw["mixers"]),
        int(raw["in_tuples"]),
    )
