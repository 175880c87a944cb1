"""Open Medusa heads: a folder of heads, or a full model that has them inside. No torch here.

Only headers are read. PyTorch files are refused with the command that converts them; `open_source`,
for that command and for looking, reads them too (`medusa/pickled.py`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload_rt.config import DraftConfig
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.medusa.calibration import read_calibration, tree_for
from offload_rt.medusa.names import TOKEN_MAP, Names, read_names
from offload_rt.medusa.pickled import PickledTensor, open_pickled
from offload_rt.model.checkpoint import DTYPE_BYTES, MEDUSA_PREFIX, Checkpoint, resolve_model
from offload_rt.model.files import FileIdentity, open_inside, read_json_object, shown
from offload_rt.model.header import TensorExtent, read_header
from offload_rt.model.layout import FLOATS, LayerLayout, Packing, compute_dtype, plan_layout
from offload_rt.model.shards import find_weights, read_shards

HEADS_FILE, PICKLED_HEADS = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
FULL_MODEL, FULL_INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"

_CONFIG_LIMIT_BYTES = 4 * 2**20
_PICKLED_MODEL, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_INDEX_LIMIT_BYTES = 64 * 2**20
_MAP_DTYPES = {"I64": 8, "I32": 4}
PADDING_TOKENS = 512  # families pad their vocabularies differently, Qwen2.5 by up to 400


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsCheckpoint:
    """Medusa heads of which the headers were read.

    Attributes:
        names: what the tensors are.
        extents: where they lie, by our names; the token map is among them.
        files: what each file was when its header was read.
        config: `config.json`; empty if there is none.
    """

    folder: Path
    names: Names
    extents: Mapping[str, TensorExtent]
    files: Mapping[Path, FileIdentity]
    config: Mapping[str, object]

    @property
    def token_map(self) -> TensorExtent | None:
        """The token of each row of truncated output heads."""
        return self.extents.get(TOKEN_MAP)

    def layout(self, dtype: str, packing: Packing) -> LayerLayout:
        """The image of all floating tensors; its placements have the names of the files."""
        extents = [e for name, e in self.extents.items() if name != TOKEN_MAP]
        ordered = sorted(extents, key=lambda e: (e.path, e.offset, e.nbytes))
        return plan_layout(ordered, dtype, packing)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of heads, wherever it lies.

    Attributes:
        dtype: safetensors name.
    """

    dtype: str
    shape: tuple[int, ...]
    place: TensorExtent | PickledTensor
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsSource:
    """Heads to look at or to convert, in any layout.

    Attributes:
        tensors: by our names.
        pickled: whether they lie in PyTorch files.
    """

    folder: Path
    names: Names
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, object]
    pickled: bool

    def read(self, name: str) -> bytes:
        """The bytes of a tensor.

        Raises:
            CheckpointError: the file is damaged.
        """
        tensor = self.tensors[name]
        if isinstance(tensor.place, PickledTensor):
            with open_pickled(self.folder, tensor.file) as file:
                return file.read(self.names.stored[name])
        with open_inside(self.folder, tensor.file) as plain:
            data = plain.read(tensor.place.nbytes, tensor.place.offset)
        if len(data) != tensor.place.nbytes:
            raise CheckpointError(f"{tensor.place.path} became shorter while it was read")
        return data


def open_heads(folder: Path) -> HeadsCheckpoint:
    """Read the headers of heads in safetensors files.

    Raises:
        CheckpointError: there are none, they are PyTorch files, or something is wrong with them.
    """
    folder = Path(os.path.abspath(folder))
    if pickles := _pickles(folder):
        raise CheckpointError(
            f"{folder} holds its heads as {pickles[0]}, a pickle, which is never opened for a run: "
            f"convert them with `offload-run medusa convert {folder} NEW_FOLDER`"
        )
    return _open_safetensors(folder)


def open_source(folder: Path) -> HeadsSource:
    """Read the headers of heads in any layout, those of PyTorch files too.

    Raises:
        CheckpointError: there are none, or something is wrong with them.
    """
    folder = Path(os.path.abspath(folder))
    pickles = _pickles(folder)
    if pickles:
        return _open_pickles(folder, pickles)
    heads = _open_safetensors(folder)
    tensors = {
        name: StoredTensor(dtype=e.dtype, shape=e.shape, place=e, file=e.path.name)
        for name, e in heads.extents.items()
    }
    return HeadsSource(
        folder=folder, names=heads.names, tensors=tensors, config=heads.config, pickled=False
    )


def open_draft_heads(target: Checkpoint, draft: DraftConfig) -> HeadsCheckpoint | None:
    """Open the heads that draft for a model, if heads do.

    Raises:
        ConfigError: they were made for a model of another size.
        CheckpointError: their files cannot be used.
    """
    if not draft.heads:
        return None
    heads = open_heads(resolve_model(draft.heads))
    shape, config = heads.names.shape, target.config
    rows = (target.head or target.embedding).shape[0]
    if shape.hidden_size != config.hidden_size:
        raise ConfigError(
            f"--draft medusa: the heads in {heads.folder.name} are for a hidden state of "
            f"{shape.hidden_size} numbers, {target.folder.name} has {config.hidden_size}: take "
            "heads made for this model"
        )
    if shape.head_rows and not shape.truncated and abs(shape.head_rows - rows) > PADDING_TOKENS:
        raise ConfigError(
            f"--draft medusa: the heads in {heads.folder.name} know {shape.head_rows} tokens, "
            f"{target.folder.name} {rows}: take heads made for this model"
        )
    if heads.token_map is not None and shape.head_rows != heads.token_map.shape[0]:
        raise ConfigError(
            f"--draft medusa: {heads.folder.name} stores output heads of {shape.head_rows} rows of "
            f"which its token_map uses {heads.token_map.shape[0]}: leave out the others with "
            f"`offload-run medusa convert {heads.folder} NEW_FOLDER --to vllm`"
        )
    _check_tree(heads, draft)
    return heads


def heads_bytes(
    heads: HeadsCheckpoint | None,
    target: Checkpoint,
    dtype: str,
    packing: Packing,
    sequences: int,
) -> int:
    """Device memory of heads, if any, and of what they compute for that many sequences at once."""
    if heads is None:
        return 0
    shape = heads.names.shape
    name = compute_dtype(target.config.dtype, target.tensors.values(), dtype)
    number_bytes = DTYPE_BYTES[{v: k for k, v in FLOATS.items()}[name]]
    rows = shape.head_rows or (target.head or target.embedding).shape[0]
    states = shape.heads * sequences
    logits = states * rows * (number_bytes + 4)  # choosing the likeliest needs a copy to sort
    hidden = states * shape.hidden_size * 4 * number_bytes
    token_map = 8 * shape.head_rows if shape.truncated else 0
    return heads.layout(name, packing).nbytes + token_map + logits + hidden


def _check_tree(heads: HeadsCheckpoint, draft: DraftConfig) -> None:
    """Refuse more nodes than there is a tree for; a calibrated tree may be as large as is of use.

    Raises:
        ConfigError: they are more.
        CheckpointError: the calibration cannot be used.
    """
    tree = tree_for(heads.folder, heads.names.shape.heads, draft.nodes)
    calibrated = read_calibration(heads.folder) is not None
    if not calibrated and draft.draft_tokens is not None and draft.draft_tokens > len(tree):
        raise ConfigError(
            f"--draft-tokens is {draft.draft_tokens}, the tree of these heads has {len(tree)} "
            "nodes: lower it, or find larger trees with `offload-run medusa calibrate`"
        )


def _open_safetensors(folder: Path) -> HeadsCheckpoint:
    if os.path.lexists(folder / HEADS_FILE):
        identity, found = read_header(folder, HEADS_FILE)
        extents, files = {e.name: e for e in found}, {identity.path: identity}
    elif os.path.isdir(folder) and not _has_model(folder):
        raise CheckpointError(
            f"{folder} holds no Medusa heads: expected {HEADS_FILE}, {PICKLED_HEADS}, or a "
            f"{FULL_MODEL} with heads in it"
        )
    else:
        extents, files = read_shards(folder, find_weights(folder))
    config = _read_config(folder)
    shapes = {name: e.shape for name, e in extents.items()}
    names = read_names(shapes, str(folder), one_head_for_all=_shares(config))
    ours = {name: extents[stored] for name, stored in names.stored.items()}
    _check_dtypes(folder, {name: e.dtype for name, e in ours.items()})
    used = {e.path for e in ours.values()}
    return HeadsCheckpoint(
        folder=folder,
        names=names,
        extents=ours,
        files={path: identity for path, identity in files.items() if path in used},
        config=config,
    )


def _open_pickles(folder: Path, pickles: Sequence[str]) -> HeadsSource:
    found: dict[str, StoredTensor] = {}
    file_bytes = 0
    for name in pickles:
        with open_pickled(folder, name) as file:
            file_bytes += file.identity.size
            for tensor, place in file.tensors.items():
                if tensor in found:
                    raise CheckpointError(
                        f"{folder}: tensor {shown(tensor)} is in {found[tensor].file} and in "
                        f"{name}: download the heads again"
                    )
                found[tensor] = StoredTensor(
                    dtype=place.dtype, shape=place.shape, place=place, file=name
                )
    config = _read_config(folder)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    names = read_names(shapes, str(folder), one_head_for_all=_shares(config))
    tensors = {ours: found[stored] for ours, stored in names.stored.items()}
    claimed = sum(tensor.place.nbytes for tensor in tensors.values())
    if claimed > file_bytes:  # a small file must not make a large one
        raise CheckpointError(
            f"{folder}: the heads' tensors claim {claimed} bytes of files that have {file_bytes}: "
            "some share theirs, download the heads again"
        )
    _check_dtypes(folder, {name: tensor.dtype for name, tensor in tensors.items()})
    return HeadsSource(folder=folder, names=names, tensors=tensors, config=config, pickled=True)


def _pickles(folder: Path) -> list[str]:
    """PyTorch files that hold the heads, when no safetensors file does."""
    if os.path.lexists(folder / HEADS_FILE):
        return []
    if os.path.lexists(folder / PICKLED_HEADS):
        return [PICKLED_HEADS]
    if _has_model(folder):
        return []
    if os.path.lexists(folder / _PICKLED_INDEX):
        return _indexed_pickles(folder)
    return [_PICKLED_MODEL] if os.path.lexists(folder / _PICKLED_MODEL) else []


def _indexed_pickles(folder: Path) -> list[str]:
    """The shards of a full model in PyTorch files that hold its heads."""
    index = read_json_object(folder, _PICKLED_INDEX, _INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder / _PICKLED_INDEX} has no weight_map: download it again")
    shards = {shard for name, shard in index.items() if name.startswith(MEDUSA_PREFIX)}
    if not shards:
        raise CheckpointError(
            f"{folder / _PICKLED_INDEX} lists no tensor {MEDUSA_PREFIX}*: this model has no "
            "Medusa heads"
        )
    odd = [
        shard for shard in shards if not isinstance(shard, str) or os.path.basename(shard) != shard
    ]
    if odd:
        raise CheckpointError(f"{folder / _PICKLED_INDEX} names {shown(odd[0])}, not a file name")
    return sorted(shards)


def _has_model(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (FULL_MODEL, FULL_INDEX))


def _read_config(folder: Path) -> Mapping[str, object]:
    if not os.path.lexists(folder / CONFIG):
        return {}
    return read_json_object(folder, CONFIG, _CONFIG_LIMIT_BYTES)


def _shares(config: Mapping[str, object]) -> bool:
    """Whether vLLM would give all heads the first one's output head."""
    return config.get("original_lm_head") is True


def _check_dtypes(folder: Path, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        accepted = _MAP_DTYPES if name == TOKEN_MAP else FLOATS
        if dtype not in accepted:
            raise CheckpointError(
                f"{folder}: {name} is {dtype}, accepted are {', '.join(accepted)}: get the heads "
                "in one of these formats"
            )


def stated_heads(config: Mapping[str, object]) -> int | None:
    """How many heads `config.json` says there are; the tensors decide."""
    for key in ("medusa_num_heads", "num_heads"):
        if isinstance(value := config.get(key), int):
            return value
    return None


def base_model(config: Mapping[str, object]) -> str | None:
    """The model the heads were made for, as `config.json` names it."""
    value = config.get("base_model_name_or_path")
    return value if isinstance(value, str) and value not in ("", "N/A") else None
