"""Open Medusa heads: a folder of heads, or a full model that has them inside. No torch here.

Only headers are read. PyTorch files are refused with the command that converts them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload_rt.config import DraftConfig
from offload_rt.device.kinds import DeviceKind, Packing
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.checkpoint import DTYPE_BYTES, Checkpoint, resolve_model
from offload_rt.model.config import PADDING_TOKENS
from offload_rt.model.files import FileIdentity, read_json_object
from offload_rt.model.header import TensorExtent, read_header
from offload_rt.model.layout import CODES, FLOATS, LayerLayout, compute_dtype, plan_layout
from offload_rt.model.shards import find_weights, read_shards
from offload_rt.speculative.medusa.calibration import read_calibration, tree_for
from offload_rt.speculative.medusa.names import TOKEN_MAP, Names, read_names

HEADS_FILE, PICKLED_HEADS = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
FULL_MODEL, FULL_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_MODEL, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG = "config.json"
CONVERT = "python tools/convert_medusa.py"

_CONFIG_LIMIT_BYTES = 4 * 2**20
_MAP_DTYPES = {"I64": 8, "I32": 4}


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


def open_heads(folder: Path) -> HeadsCheckpoint:
    """Read the headers of heads in safetensors files.

    Raises:
        CheckpointError: there are none, they are PyTorch files, or something is wrong with them.
    """
    folder = Path(os.path.abspath(folder))
    if (pickles := _pickles(folder)) is not None:
        raise CheckpointError(
            f"{folder} holds its heads as {pickles}, a pickle, which no run opens: convert them "
            f"with `{CONVERT} {folder} NEW_FOLDER`, a tool of the source repository"
        )
    return _open_safetensors(folder)


def recognise(
    folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]]
) -> tuple[Names, Mapping[str, object]]:
    """What the tensors of a folder are, and what its `config.json` says.

    Args:
        folder: where they lie.
        tensors: shape and safetensors dtype of each, by the names of the files.

    Raises:
        CheckpointError: they are no heads, or of another number format.
    """
    config = _read_config(folder)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    names = read_names(shapes, str(folder), one_head_for_all=_shares(config))
    _check_dtypes(folder, {ours: tensors[stored][1] for ours, stored in names.stored.items()})
    return names, config


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
            f"`{CONVERT} {heads.folder} NEW_FOLDER --to vllm`"
        )
    _check_tree(heads, draft)
    return heads


def heads_bytes(
    heads: HeadsCheckpoint | None,
    target: Checkpoint,
    dtype: str,
    device: DeviceKind,
    sequences: int,
) -> int:
    """Device memory of heads, if any, and of what they compute for that many sequences at once.

    Where they are recorded, what they compute is there twice: as it is tried, and in the pool.
    """
    if heads is None:
        return 0
    shape = heads.names.shape
    name = compute_dtype(target, dtype)
    number_bytes = DTYPE_BYTES[CODES[name]]
    rows = shape.head_rows or (target.head or target.embedding).shape[0]
    states = shape.heads * sequences
    logits = states * rows * (number_bytes + 4)  # choosing the likeliest needs a copy to sort
    hidden = states * shape.hidden_size * 4 * number_bytes
    token_map = 8 * shape.head_rows if shape.truncated else 0
    computed = (logits + hidden) * (2 if device.records else 1)
    return heads.layout(name, device.packing).nbytes + token_map + computed


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
    names, config = recognise(folder, {name: (e.shape, e.dtype) for name, e in extents.items()})
    ours = {name: extents[stored] for name, stored in names.stored.items()}
    used = {e.path for e in ours.values()}
    return HeadsCheckpoint(
        folder=folder,
        names=names,
        extents=ours,
        files={path: identity for path, identity in files.items() if path in used},
        config=config,
    )


def _pickles(folder: Path) -> str | None:
    """The PyTorch file that holds the heads, if no safetensors file does."""
    if os.path.lexists(folder / HEADS_FILE):
        return None
    if os.path.lexists(folder / PICKLED_HEADS):
        return PICKLED_HEADS
    if _has_model(folder):
        return None
    names = (PICKLED_INDEX, PICKLED_MODEL)
    return next((name for name in names if os.path.lexists(folder / name)), None)


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
