"""A safetensors folder as exact byte extents, layer by layer; every check on untrusted files.

Only headers are read here (and, for a head that should equal the embedding, a few samples).
`safetensors` itself maps files; a mapped file that is truncated kills the process, so we do not.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.adapter import adapter_beside
from offload_rt.model.config import ModelConfig, load_model_config
from offload_rt.model.files import FileIdentity, open_inside, shown
from offload_rt.model.header import DTYPE_BYTES, TensorExtent
from offload_rt.model.locate import demo_folder, resolve_model
from offload_rt.model.shards import find_weights, read_shards

__all__ = [
    "DTYPE_BYTES",
    "Checkpoint",
    "FileIdentity",
    "TensorExtent",
    "demo_folder",
    "open_checkpoint",
    "resolve_model",
]

_log = logging.getLogger(__name__)

# integers and booleans are masks and counters of older checkpoints; other floats are not streamed
_UNSUPPORTED_DTYPES = {"F64", "C64", *(name for name in DTYPE_BYTES if name.startswith("F8"))}

MEDUSA_PREFIX = "medusa_head."  # of heads that a full model carries; medusa/ reads them
_CONTAINERS = ("layers", "h", "blocks", "layer", "block")
_LAYER_NAME = re.compile(r"(?P<prefix>[^.]+(?:\.[^.]+)*?)\.(?P<index>0|[1-9][0-9]{0,5})\..+")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embedding.weight",
    "embeddings.weight",
)
_HEADS = ("lm_head.weight", "embed_out.weight")
_TEXT_PART = "language_model."
_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """The files of a model: what lies where. One is equal to itself only, and so can be a key.

    Attributes:
        folder: the model folder.
        config: its `config.json`.
        tensors: every tensor the network uses, by name.
        layers: tensors of each decoder layer, in the order of their bytes.
        others: tensors of no layer (embedding, final norm, head), in the order of their bytes.
        embedding: [rows >= vocab_size, hidden_size].
        head: [rows >= vocab_size, hidden_size]; None when the embedding is the head too.
        tied_head: a copy of the embedding stored as head; ignored and in no other attribute.
        files: what each file was when its header was read.
    """

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorExtent]
    layers: tuple[tuple[TensorExtent, ...], ...]
    others: tuple[TensorExtent, ...]
    embedding: TensorExtent
    head: TensorExtent | None
    tied_head: TensorExtent | None
    files: Mapping[Path, FileIdentity]

    def require_rows(self, ids: Iterable[int]) -> None:
        """Refuse token ids that the embedding has no row for.

        Raises:
            ConfigError: there is such an id.
        """
        rows = self.embedding.shape[0]
        for token_id in ids:
            if not 0 <= token_id < rows:
                raise ConfigError(
                    f"token {token_id} has no row in the embedding of {self.folder.name}, which "
                    f"has {rows}: take the tokenizer these weights came with"
                )

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors the network uses."""
        return _nbytes(self.tensors.values())

    @property
    def others_bytes(self) -> int:
        """Bytes of the tensors that belong to no layer."""
        return _nbytes(self.others)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one layer."""
        return _nbytes(self.layers[layer])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a model folder and check them against `config.json` and each other.

    Raises:
        CheckpointError: anything is missing, damaged, unsafe, contradictory or not supported.
    """
    folder = Path(os.path.abspath(folder))
    index = find_weights(folder)
    if (found := adapter_beside(folder)) is not None:
        _log.warning(
            "%s holds an adapter (%s) beside the model: it is not applied", folder.name, found
        )
    config = load_model_config(folder)
    tensors, files = read_shards(folder, index)
    tensors = {n: e for n, e in tensors.items() if not n.startswith(MEDUSA_PREFIX)}
    if config.part_of and not any(_TEXT_PART in name for name in tensors):
        raise CheckpointError(
            f"{folder}: config.json is of a {shown(config.part_of)} model with a text part, but no "
            f"tensor is named like {_TEXT_PART}model.layers.0.x: files and config are not of one "
            "model"
        )
    _check_dtypes(tensors.values())
    layers = _group_layers(folder, tensors.values(), config.num_layers)
    in_layers = {extent.name for layer in layers for extent in layer}
    others = [extent for extent in tensors.values() if extent.name not in in_layers]
    embedding = _embedding(folder, others, config)
    head, tied_head = _head(folder, others, config, embedding)
    if tied_head is not None:
        others.remove(tied_head)
        del tensors[tied_head.name]
    return Checkpoint(
        folder=folder,
        config=config,
        tensors=MappingProxyType(tensors),
        layers=layers,
        others=_in_file_order(others),
        embedding=embedding,
        head=head,
        tied_head=tied_head,
        files=MappingProxyType(files),
    )


def _nbytes(extents: Iterable[TensorExtent]) -> int:
    return sum(extent.nbytes for extent in extents)


def _in_file_order(extents: Iterable[TensorExtent]) -> tuple[TensorExtent, ...]:
    return tuple(sorted(extents, key=lambda extent: (extent.path, extent.offset, extent.nbytes)))


def _check_dtypes(extents: Iterable[TensorExtent]) -> None:
    for extent in extents:
        if extent.dtype in _UNSUPPORTED_DTYPES:
            raise CheckpointError(
                f"{extent.path}, tensor {shown(extent.name)}, is {extent.dtype}: this version "
                "streams BF16, F16 and F32 weights only, use the original model"
            )


def _group_layers(
    folder: Path, extents: Iterable[TensorExtent], num_layers: int
) -> tuple[tuple[TensorExtent, ...], ...]:
    """Tensors by layer number, under the one name prefix that numbers exactly all layers."""
    groups: dict[str, dict[int, list[TensorExtent]]] = {}
    for extent in extents:
        if match := _LAYER_NAME.fullmatch(extent.name):
            by_index = groups.setdefault(match["prefix"], {})
            by_index.setdefault(int(match["index"]), []).append(extent)
    wanted = set(range(num_layers))
    complete = [prefix for prefix, by_index in groups.items() if by_index.keys() == wanted]
    named = [prefix for prefix in complete if _is_container(prefix)]
    chosen = named or complete
    if not chosen:
        raise CheckpointError(f"{folder}: {_why_no_layers(groups, num_layers)}")
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder}: {len(chosen)} groups of tensors are numbered as the {num_layers} layers "
            f"({shown(chosen[0])}, {shown(chosen[1])}): this kind of model is not supported"
        )
    by_index = groups[chosen[0]]
    return tuple(_in_file_order(by_index[i]) for i in range(num_layers))


def _is_container(prefix: str) -> bool:
    return prefix.rpartition(".")[2] in _CONTAINERS


def _why_no_layers(groups: Mapping[str, Mapping[int, object]], num_layers: int) -> str:
    if not groups:
        return (
            f"config.json says {num_layers} layers, but no tensor is named like model.layers.0.x: "
            "files and config are not of one model"
        )
    prefix = max(groups, key=lambda name: (_is_container(name), len(groups[name])))
    found = groups[prefix].keys()
    wanted = range(num_layers)
    missing = [i for i in wanted if i not in found]
    extra = sorted(i for i in found if i not in wanted)
    differences = [
        f"{what} {', '.join(map(str, some[:5]))}{' and more' if len(some) > 5 else ''}"
        for what, some in (("missing are", missing), ("not expected are", extra))
        if some
    ]
    return (
        f"config.json says {num_layers} layers, the files have {len(found)} under "
        f"{shown(prefix)} ({'; '.join(differences)}): files and config are not of one model"
    )


def _by_name(extents: Iterable[TensorExtent], names: tuple[str, ...]) -> list[TensorExtent]:
    endings = tuple(f".{name}" for name in names)
    return [e for e in extents if e.name in names or e.name.endswith(endings)]


def _has_row_per_token(extent: TensorExtent, config: ModelConfig) -> bool:
    rows, width = extent.shape if len(extent.shape) == 2 else (0, 0)
    return rows >= config.vocab_size and width == config.hidden_size


def _embedding(folder: Path, extents: list[TensorExtent], config: ModelConfig) -> TensorExtent:
    named = _by_name(extents, _EMBEDDINGS)
    fitting = [extent for extent in named if _has_row_per_token(extent, config)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"{folder} has {len(fitting)} token embeddings ({shown(fitting[0].name)}, "
            f"{shown(fitting[1].name)}): this kind of model is not supported"
        )
    if named:
        raise _misshapen(named[0], config)
    raise CheckpointError(
        f"{folder} has no token embedding (a tensor named like model.embed_tokens.weight): files "
        "are missing or this kind of model is not supported"
    )


def _head(
    folder: Path, extents: list[TensorExtent], config: ModelConfig, embedding: TensorExtent
) -> tuple[TensorExtent | None, TensorExtent | None]:
    """The head, and a stored copy of the embedding that stands in its place.

    As transformers does when the config ties the two but both are stored: equal ones are tied, a
    head that differs is used (modeling_utils.py, `tie_weights`).
    """
    named = _by_name(extents, _HEADS)
    if len(named) > 1:
        raise CheckpointError(
            f"{folder} has {len(named)} heads ({shown(named[0].name)}, {shown(named[1].name)}): "
            "this kind of model is not supported"
        )
    if not named:
        if config.tie_word_embeddings is False:
            raise CheckpointError(
                f"{folder} has no head (lm_head.weight), but tie_word_embeddings is false in "
                "config.json: download the missing files, or set it to true"
            )
        return None, None
    head = named[0]
    if not _has_row_per_token(head, config):
        raise _misshapen(head, config)
    if config.tie_word_embeddings and _samples_agree(folder, embedding, head):
        return None, head
    if config.tie_word_embeddings:
        _log.warning("%s differs from the embedding it should be: it is used as it is", head.name)
    return head, None


def _misshapen(extent: TensorExtent, config: ModelConfig) -> CheckpointError:
    return CheckpointError(
        f"{extent.path}, tensor {shown(extent.name)}, has shape {list(extent.shape)}, config.json "
        f"says vocab_size {config.vocab_size} and hidden_size {config.hidden_size}: files and "
        "config are not of one model"
    )


def _samples_agree(folder: Path, one: TensorExtent, other: TensorExtent) -> bool:
    """Whether two tensors are equal, judged by samples spread over all of their bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    last = max(0, one.nbytes - _SAMPLE_BYTES)
    places = [last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    return _samples(folder, one, places) == _samples(folder, other, places)


def _samples(folder: Path, extent: TensorExtent, places: list[int]) -> list[bytes]:
    size = min(_SAMPLE_BYTES, extent.nbytes)
    with open_inside(folder, extent.path.name) as file:
        return [file.read(size, extent.offset + place) for place in places]
