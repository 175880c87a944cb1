"""Put an adapter into a model's weights, exactly as peft does, one module at a time.

peft merges modules (`merge_and_unload`). Here each has its weights just before it is merged, and
lends them for the result only, so a model larger than memory can be merged. What changed is kept as
one safetensors file, and the checkpoint names its tensors in place of its own. So streaming,
planning and rounding know nothing of adapters, and a pass costs what it cost.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from offload_rt.adapters.reading import Adapter
from offload_rt.device.base import PAGE_BYTES
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.folders import cache_folder
from offload_rt.model.checkpoint import Checkpoint, TensorExtent, in_file_order
from offload_rt.model.files import FileIdentity, shown
from offload_rt.model.header import read_header
from offload_rt.model.hf_config import reason_of
from offload_rt.model.layout import CODES, compute_dtype
from offload_rt.model.network import modules_and_tensors
from offload_rt.model.weight_files import WeightFiles
from offload_rt.units import format_size
from offload_rt.writing import A_DAY_S, make_folder, replacing, sweep, writing

_log = logging.getLogger(__name__)

_VERSION = 1  # of the files that are kept
_NAME = "default"  # peft's own for the first adapter


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """Tensors that come from one module of an adapter.

    Attributes:
        names: of the parameters.
        make: makes them, in that order.
    """

    names: tuple[str, ...]
    make: Callable[[], list[torch.Tensor]]


def with_adapter(
    checkpoint: Checkpoint,
    adapter: Adapter,
    dtype: str,
    on_write: Callable[[int, Callable[[], int]], None] = lambda total, done: None,
) -> Checkpoint:
    """The model with an adapter in its weights.

    What changed is written once, to a file that depends on both and on the number format.

    Args:
        checkpoint: headers of the model.
        adapter: headers of the adapter.
        dtype: number format of the computation, or `auto`; peft adds in it.
        on_write: called before a file is written with its size, and what tells how far it is.

    Raises:
        ConfigError: peft is not installed, the file cannot be written, or weights are quantised.
        CheckpointError: the two do not belong together, or cannot be merged exactly.
    """
    if checkpoint.stored:
        raise ConfigError(
            f"--adapter is for models whose weights are not quantised: merge {shown(adapter.name)} "
            f"into the model that {checkpoint.name} was made from"
        )
    name = compute_dtype(checkpoint, dtype)
    path = _path(checkpoint, adapter, name)
    if not path.exists():
        _write(checkpoint, adapter, name, path, on_write)
    identity, extents = read_header(path.parent, path.name)
    _log.warning(
        "adapter %s, %s of rank %s on %s, is merged into %d of %d tensors (%s in %s)",
        shown(adapter.name),
        adapter.kind,
        shown(adapter.rank),
        shown(adapter.targets),
        len(extents),
        len(checkpoint.tensors),
        format_size(identity.size),
        path,
    )
    return _instead(checkpoint, adapter.name, identity, {e.name: e for e in extents})


def _instead(
    checkpoint: Checkpoint,
    adapter: str,
    identity: FileIdentity,
    changed: Mapping[str, TensorExtent],
) -> Checkpoint:
    """The checkpoint with other tensors of the same names."""

    def now(extent: TensorExtent) -> TensorExtent:
        return changed.get(extent.name, extent)

    head = checkpoint.head
    return dataclasses.replace(
        checkpoint,
        adapter=adapter,
        tensors=MappingProxyType({name: now(e) for name, e in checkpoint.tensors.items()}),
        layers=tuple(in_file_order(map(now, layer)) for layer in checkpoint.layers),
        others=in_file_order(map(now, checkpoint.others)),
        embedding=now(checkpoint.embedding),
        head=None if head is None else now(head),
        files=MappingProxyType({**checkpoint.files, identity.path: identity}),
    )


def _path(checkpoint: Checkpoint, adapter: Adapter, dtype: str) -> Path:
    """Where the result is kept; another file where anything it depends on is another."""
    files = [dataclasses.astuple(i) for i in (*checkpoint.files.values(), *adapter.files)]
    versions = [importlib.metadata.version("torch"), _peft_version()]
    state = json.dumps([_VERSION, dtype, versions, files], default=os.fspath)
    which = json.dumps([str(checkpoint.folder), str(adapter.folder.resolve()), dtype])
    one, other = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (which, state))
    return cache_folder() / "adapters" / f"{one}-{other}.safetensors"


def _write(
    checkpoint: Checkpoint,
    adapter: Adapter,
    dtype: str,
    path: Path,
    on_write: Callable[[int, Callable[[], int]], None],
) -> None:
    files = WeightFiles(checkpoint.files)
    try:
        model, places = modules_and_tensors(checkpoint, getattr(torch, dtype))
        changes = list(_changes(_loaded(model, adapter), adapter, places, files))
        header, starts, total = _header(places, changes)
        sweep(make_folder(path.parent), A_DAY_S)
        _require_room(path.parent, total)
        done = 0
        on_write(total, lambda: done)
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for change in changes:
                for name, tensor in zip(change.names, change.make(), strict=True):
                    file.seek(starts[name])
                    file.write(_checked(tensor, name, adapter).view(torch.uint8).numpy().data)
                    done += tensor.nbytes
    finally:
        files.close()
    for old in path.parent.glob(f"{path.name.partition('-')[0]}-*.safetensors"):
        if old != path:  # of the same adapter, before it or the model was another
            old.unlink(missing_ok=True)


def _require_room(folder: Path, nbytes: int) -> None:
    with writing(folder):
        free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ConfigError(
            f"the model's changed weights need {format_size(nbytes)} in {folder}, "
            f"{format_size(free)} are free there: make room, or set OFFLOAD_RT_CACHE to another "
            "folder"
        )


def _checked(tensor: torch.Tensor, name: str, adapter: Adapter) -> torch.Tensor:
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{shown(name)} is NaN or infinite with adapter {shown(adapter.name)}: its file is "
            "damaged or its training went wrong, or --dtype float32 is needed"
        )
    return tensor.contiguous().flatten()


def _header(
    places: Mapping[str, tuple[TensorExtent, torch.dtype]], changes: list[_Change]
) -> tuple[bytes, dict[str, int], int]:
    """The head of a safetensors file, where each parameter begins in it, and its whole size.

    Tensors are in the order of the model's files, so that those of a layer are read in one go.
    """
    order = sorted(
        (name for change in changes for name in change.names),
        key=lambda name: (places[name][0].path, places[name][0].offset),
    )
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, starts = 0, {}
    for name in order:
        extent, dtype = places[name]
        starts[name] = at
        end = at + extent.nbytes // extent.element_bytes * dtype.itemsize
        entries[extent.name] = {
            "dtype": CODES[str(dtype).removeprefix("torch.")],
            "shape": list(extent.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + at


def _peft_version() -> str:
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "--adapter needs peft, which is not installed: pip install 'offload-rt[train]'"
        ) from error


def _loaded(model: torch.nn.Module, adapter: Adapter) -> Any:  # noqa: ANN401 - peft has no types
    """The model with peft's modules; what is not on meta then came with the adapter.

    Raises:
        CheckpointError: peft cannot load it, or not all of it.
    """
    import peft

    state: dict[str, torch.Tensor] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(adapter.folder))
            config.inference_mode = True
            made = peft.PeftModel(model, config, low_cpu_mem_usage=True)
            note = made.register_load_state_dict_pre_hook(lambda _, given, *__: state.update(given))
            made.load_adapter(
                str(adapter.folder), _NAME, torch_device="cpu", low_cpu_mem_usage=True
            )
    except Exception as error:
        raise CheckpointError(
            f"peft cannot put adapter {shown(adapter.name)} on this model: {reason_of(error)}"
        ) from error
    note.remove()
    # peft has moved what it loaded to where the model's weights are, and these are nowhere.
    made.load_state_dict(state, strict=False, assign=True)
    base = made.get_base_model()
    found = dict(base.named_parameters())
    lacking = [name for name, p in found.items() if p.is_meta and _is_adapters(name)]
    loaded = sum(not p.is_meta for p in found.values())
    if lacking or loaded != adapter.tensors:
        what = f"no {shown(lacking[0])}" if lacking else f"{adapter.tensors} tensors"
        raise CheckpointError(
            f"adapter {shown(adapter.name)} has {what}, the model has a place for {loaded} of its "
            "tensors: the two do not belong together"
        )
    for name, parameter in found.items():
        if ".lora_" in name:  # as peft keeps those of a model in 16 bits
            parameter.data = parameter.data.float()
    return base


def _is_adapters(name: str) -> bool:
    return ".lora_" in name or f".modules_to_save.{_NAME}." in name


def _changes(
    base: Any,  # noqa: ANN401
    adapter: Adapter,
    places: Mapping[str, tuple[TensorExtent, torch.dtype]],
    files: WeightFiles,
) -> Iterator[_Change]:
    """All that an adapter changes.

    Raises:
        CheckpointError: it changes what the files hold for two parameters, or not as one tensor.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned: set[str] = set()
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            leaves = ("weight", "bias") if module.lora_bias[_NAME] else ("weight",)
            names = tuple(f"{path}.{leaf}" for leaf in leaves)
            own = {leaf: _place(f"{path}.{leaf}", adapter, places) for leaf in leaves}
            tuned.update(names)
            yield _Change(names, lambda m=module, o=own: _merged(m, o, files))  # type: ignore[misc]
    for name, parameter in base.named_parameters():
        key = name.replace(".base_layer.", ".").replace(f".modules_to_save.{_NAME}.", ".")
        if parameter.is_meta or ".lora_" in name or key in tuned:
            continue
        dtype = _place(key, adapter, places)[1]
        yield _Change((key,), lambda p=parameter, d=dtype: [p.data.to(d)])  # type: ignore[misc]


def _place(
    name: str, adapter: Adapter, places: Mapping[str, tuple[TensorExtent, torch.dtype]]
) -> tuple[TensorExtent, torch.dtype]:
    if name not in places:
        raise CheckpointError(
            f"adapter {shown(adapter.name)} changes {shown(name)}, which shares its tensor with "
            "another (a head tied to the embedding, or experts in one): merge it with peft's "
            "merge_and_unload, and run what that makes"
        )
    return places[name]


def _merged(
    module: Any,  # noqa: ANN401
    own: Mapping[str, tuple[TensorExtent, torch.dtype]],
    files: WeightFiles,
) -> list[torch.Tensor]:
    """Lend a module its weights and let peft merge it."""
    parameters = module.get_base_layer()._parameters
    empty = dict(parameters)
    for leaf, (extent, dtype) in own.items():
        tensor = files.read(extent) if parameters[leaf].is_meta else parameters[leaf].data
        parameters[leaf] = torch.nn.Parameter(tensor.to(dtype), requires_grad=False)
    with torch.no_grad():
        module.merge()
    made = [parameters[leaf].data for leaf in own]
    assert [tensor.dtype for tensor in made] == [dtype for _, dtype in own.values()]
    parameters.update(empty)
    return made
