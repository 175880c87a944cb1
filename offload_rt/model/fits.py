"""What passes over shapes found of a family's modules, kept from run to run.

The probe's pass computes shapes by code that imports torch's compiler and sympy: 80 MiB and 1.2 s
of processor time (docs/RESULTS.md, "Memory beside the device memory"). Its verdict depends on the
class, the number format, the configuration, and on the code that is asked and that asks. So it is
kept under a digest of all of these, of transformers' own classes only; refusals are found anew.
A program that has us as a library has imported the compiler with transformers, and asks once in
each process.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from offload_rt.entries import read_entries, write_entries
from offload_rt.folders import cache_folder
from offload_rt.kv.base import KVShape
from offload_rt.model.config import ModelConfig
from offload_rt.model.exact import Looks
from offload_rt.model.mixing import Mixer
from offload_rt.model.sparing import apart, is_spared

_FITS, _LOOKS = "fits.json", "looks.json"
_MOST_ENTRIES = 64
_OURS = (
    *("probe", "probe_flow", "probe_states"),
    *("mixing", "attention_function", "experts", "fits", "exact"),
)

_looks: dict[str, Looks] = {}  # what this process asked for


@dataclass(frozen=True, slots=True)
class Fit:
    """What layers keep of a sequence, and who computes their experts.

    Attributes:
        kv: keys and values of each layer, `NO_KV` where it does not attend.
        experts: modules whose experts the registered function computes, by name, and to how many
            of them a row is sent.
        mixers: what has a state.
        in_tuples: layers return their rows in a tuple of that length; 0: alone.
        apart: why layers cannot be on several devices; empty if they can.
    """

    kv: tuple[KVShape, ...]
    experts: Mapping[str, int]
    mixers: tuple[Mixer, ...] = ()
    in_tuples: int = 0
    apart: str = ""


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


def kept_fit(key: str) -> Fit | None:
    """What an earlier run found."""
    return read_entries(cache_folder() / _FITS, fit_of).get(key)


def keep_fit(key: str, fit: Fit) -> None:
    """Keep what was found for runs to come."""
    path = cache_folder() / _FITS
    entries = {name: asdict(each) for name, each in read_entries(path, fit_of).items()}
    write_entries(path, entries | {key: asdict(fit)}, _MOST_ENTRIES)


def fit_of(raw: Any) -> Fit:  # noqa: ANN401
    """What `asdict` made of one."""
    return Fit(
        tuple(KVShape(**shape) for shape in raw["kv"]),
        {str(name): int(count) for name, count in raw["experts"].items()},
        tuple(Mixer(**mixer) for mixer in raw["mixers"]),
        int(raw["in_tuples"]),
        str(raw["apart"]),
    )


def looks(model: torch.nn.Module, config: ModelConfig, find: Callable[[], Looks]) -> Looks:
    """What a network computes, as this process or an earlier command found it; else as `find` does.

    Its pass over shapes was 36 % of the processor time in which engines of tiny models opened
    (sampled over the tests of commands), so a process makes one for all engines of a model.
    """
    if not type(model).__module__.startswith("transformers."):
        return find()
    if (key := _looks_key(model, config)) not in _looks:
        _looks[key] = _kept_or_found(key, find) if is_spared() else find()
    return _looks[key]


def _kept_or_found(key: str, find: Callable[[], Looks]) -> Looks:
    known = _kept_looks()
    if key not in known:
        known[key] = looks_in(apart(lambda: as_entry(find())))
        _keep_looks(known)
    return known[key]


def keep_looks(model: torch.nn.Module, config: ModelConfig, found: Looks) -> None:
    """Keep what `looks` will be asked for."""
    _keep_looks(_kept_looks() | {_looks_key(model, config): found})


def as_entry(looks: Looks) -> dict[str, object]:
    """What JSON can hold of them; `looks_in` reads it."""
    return {"problem": looks.problem, "regular": looks.regular, "shapes": sorted(looks.shapes)}


def looks_in(raw: Any) -> Looks:  # noqa: ANN401
    """What `as_entry` wrote."""
    shapes = frozenset((int(inputs), int(outputs)) for inputs, outputs in raw["shapes"])
    return Looks(problem=str(raw["problem"]), regular=bool(raw["regular"]), shapes=shapes)


def _looks_key(model: torch.nn.Module, config: ModelConfig) -> str:
    kinds = sorted({f"{type(part).__module__}.{type(part).__name__}" for part in model.modules()})
    dtype = next(model.parameters()).dtype
    return hashlib.sha256("\0".join([fit_key(config, dtype), *kinds]).encode()).hexdigest()


def _kept_looks() -> dict[str, Looks]:
    return dict(read_entries(cache_folder() / _LOOKS, looks_in))


def _keep_looks(known: Mapping[str, Looks]) -> None:
    entries = {name: as_entry(each) for name, each in known.items()}
    write_entries(cache_folder() / _LOOKS, entries, _MOST_ENTRIES)
