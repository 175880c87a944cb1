"""A model folder as exact byte extents, layer by layer; every check on untrusted files.

Only headers are read here (and, where a head may equal the embedding, both).
`safetensors` itself maps files; a mapped file that is truncated kills the process, so we do not.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from offload_rt.config import Wire
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.adapter import adapter_beside
from offload_rt.model.config import ModelConfig, load_model_config
from offload_rt.model.family import Family, read_family
from offload_rt.model.files import FileIdentity, open_inside, shown
from offload_rt.model.formats.found import each_expert, find_stored
from offload_rt.model.formats.stored import Stored, StoredTensors
from offload_rt.model.formats.unstated import refuse_unstated
from offload_rt.model.gguf.folder import names_in
from offload_rt.model.gguf.tensors import open_tensors
from offload_rt.model.header import DTYPE_BYTES, TensorExtent
from offload_rt.model.locate import demo_folder, model_name, resolve_model
from offload_rt.model.names import (
    EMBEDDINGS,
    HEADS,
    drafting_module,
    ends_in,
    examples,
    sort_tensors,
    worth_saying,
)
from offload_rt.model.packed_files import CODED_DTYPE
from offload_rt.model.shards import find_weights, read_shards
from offload_rt.units import format_size

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

_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# Integers and booleans that are no matrices are masks and counters of older checkpoints; other
# floats are not streamed.
_CODE_DTYPES = {"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_UNSUPPORTED_DTYPES = {"F64", "C64", *(name for name in DTYPE_BYTES if name.startswith("F8"))}

HEAD_DIFFERS = "%s differs from the embedding it is tied to in config.json: it is used as it is"
MEDUSA_PREFIX = "medusa_head."  # of heads that a full model carries
_TEXT_PART = "language_model."
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """The files of a model: what lies where. One is equal to itself only, and so can be a key.

    Attributes:
        folder: the model folder.
        config: its `config.json`.
        tensors: every tensor the network uses, by name.
        layers: tensors of each decoder layer, in the order of their bytes.
        others: tensors of no layer (embedding, final norm, head), in the order of their bytes.
        container: what numbers the layers in the files, such as `model.layers`.
        embedding: [rows >= vocab_size, hidden_size].
        head: [rows >= vocab_size, hidden_size]; None when the embedding is the head too.
        left_out: tensors of the files that are in no other attribute: the network has no place for
            them, or they are a copy of the embedding stored as head.
        family: what transformers says of the family.
        files: what each file was when its header was read.
        adapter: name of the adapter that is merged into some of the tensors, if one is.
        stored: the quantised weight of a layer that a tensor is a part of, by the tensor's name.
        stored_ends: the same of an embedding or head, which is dequantised when it is loaded;
            `embedding` and `head` then have its name and shape, and no bytes.
        stored_drafts: the same of a module for drafting that the files hold, which is left out.
        rounded: to what its layers are rounded when they are loaded (`model/wire.py`), if they are.
        lent_ends: embedding and head are those of a network that lends them, and in no other
            attribute.
    """

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorExtent]
    layers: tuple[tuple[TensorExtent, ...], ...]
    others: tuple[TensorExtent, ...]
    container: str
    embedding: TensorExtent
    head: TensorExtent | None
    left_out: tuple[TensorExtent, ...]
    family: Family
    files: Mapping[Path, FileIdentity]
    adapter: str | None = None
    stored: Mapping[str, Stored] = field(default_factory=dict)
    stored_ends: Mapping[str, Stored] = field(default_factory=dict)
    stored_drafts: Mapping[str, Stored] = field(default_factory=dict)
    rounded: Wire | None = None
    lent_ends: bool = False

    def require_rows(self, ids: Iterable[int]) -> None:
        """Refuse token ids that the embedding has no row for.

        Raises:
            ConfigError: there is such an id.
        """
        rows = self.embedding.shape[0]
        for token_id in ids:
            if not 0 <= token_id < rows:
                raise ConfigError(
                    f"token {token_id} has no row in the embedding of {self.name}, which "
                    f"has {rows}: take the tokenizer these weights came with"
                )

    @property
    def name(self) -> str:
        """How messages call the model."""
        name = model_name(self.folder) + (f" with {self.adapter}" if self.adapter else "")
        return name if self.rounded is None else f"{name} rounded to {self.rounded}"

    @property
    def has_experts(self) -> bool:
        """Whether some of its MLPs are mixtures of experts, by its config or else by its tensors.

        A family may call their number what is not known here (`config.py`).
        """
        return self.config.has_experts or any(".experts." in name for name in self.tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors the network uses; of coded ones as they are decoded."""
        coded = {each for each in self.stored.values() if each.pieces}
        more = sum(DTYPE_BYTES[CODED_DTYPE] * each.numbers - each.nbytes for each in coded)
        return _nbytes(self.tensors.values()) + more

    @property
    def file_bytes(self) -> int:
        """Bytes they have in the files: fewer where packed, more where rounded when loaded."""
        made = {each for each in self.stored.values() if each.rounds}
        parts = {extent.name for each in made for extent in each.parts.values()}
        read = (extent.file_bytes for name, extent in self.tensors.items() if name not in parts)
        return sum(read) + sum(each.file_bytes for each in made)

    def in_files(self, extent: TensorExtent) -> TensorExtent:
        """What is read for a tensor: itself, or the weight that it is rounded from."""
        stored = self.stored.get(extent.name)
        return extent if stored is None or stored.source is None else stored.source

    @property
    def head_bias(self) -> TensorExtent | None:
        """Bias of the head, [rows], where it has one."""
        heads = {f"{head}.bias" for head in self.family.heads.union(HEADS)}
        return next((e for e in self.others if ends_in(e.name, heads)), None)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one layer."""
        return _nbytes(self.layers[layer])


def open_checkpoint(folder: Path, *, says_adapter: bool = True) -> Checkpoint:
    """Read the headers of a model folder and check them against `config.json` and each other.

    Args:
        folder: the model folder.
        says_adapter: tell that an adapter beside the model is left out.

    Raises:
        CheckpointError: anything is missing, damaged, unsafe, contradictory or not supported.
    """
    folder = Path(os.path.abspath(folder))
    gguf = names_in(folder)
    index = {} if gguf else find_weights(folder)
    if says_adapter and (found := adapter_beside(folder)) is not None:
        _log.warning(
            "%s holds an adapter (%s) beside the model: it is not applied", folder.name, found
        )
    config = load_model_config(folder)
    stored = None
    if gguf:
        tensors, files, stored = open_tensors(folder, gguf)
    else:
        tensors, files = read_shards(folder, index)
    checkpoint = sort_checkpoint(folder, config, tensors, files, stored)
    if config.part_of and not (checkpoint.left_out or any(_TEXT_PART in name for name in tensors)):
        raise CheckpointError(
            f"{folder}: config.json is of a {shown(config.part_of)} model with a text part, but "
            "the files hold a text model alone: files and config are not of one model"
        )
    return checkpoint


def sort_checkpoint(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorExtent],
    files: Mapping[Path, FileIdentity],
    stored: StoredTensors | None = None,
) -> Checkpoint:
    """Tell apart what tensors there are.

    Args:
        folder: the model folder.
        config: its `config.json`.
        tensors: all of them, by name.
        files: they are in.
        stored: the quantised weights among them; None: they are looked for.

    Raises:
        CheckpointError: one is missing, contradicts another or is not supported.
    """
    family = read_family(config.model_type)
    if stored is None:
        tensors = each_expert(folder, config.quantised, tensors)
        stored = find_stored(folder, config.quantised, tensors)
    parts = sort_tensors(
        folder,
        [
            e
            for e in tensors.values()
            if not e.name.startswith(MEDUSA_PREFIX) and e.name not in stored.facts
        ],
        config.num_layers,
        family,
        {name: f"{weight.module}.weight" for name, weight in stored.by_part.items()},
    )
    outside = {e.name: stored.by_part[e.name] for e in parts.others if e.name in stored.by_part}
    made = _made_extents(folder, outside, config, family)
    plain = [extent for extent in parts.others if extent.name not in outside]
    embedding, head, copy = _ends(folder, [*plain, *made], config, family)
    others = [extent for extent in parts.others if extent is not copy]
    used = [extent for group in (*parts.layers, others) for extent in group]
    _check_dtypes(folder, (e for e in used if e.name not in stored.by_part), tensors)
    drafts = drafting_module(parts.left_out, parts.container, config.num_layers)
    _say_what_is_left_out(
        folder, [e for e in worth_saying(parts.left_out, family) if e.name not in drafts]
    )
    names = {extent.name for extent in used}
    return Checkpoint(
        folder=folder,
        config=config,
        tensors=MappingProxyType({name: e for name, e in tensors.items() if name in names}),
        layers=tuple(map(in_file_order, parts.layers)),
        others=in_file_order(others),
        container=parts.container,
        embedding=embedding,
        head=head,
        left_out=(*parts.left_out, *([] if copy is None else [copy])),
        family=family,
        files=MappingProxyType(dict(files)),
        stored=MappingProxyType(
            {n: s for n, s in stored.by_part.items() if n in names and n not in outside}
        ),
        stored_ends=MappingProxyType(outside),
        stored_drafts=MappingProxyType({n: s for n, s in stored.by_part.items() if n in drafts}),
    )


def _made_extents(
    folder: Path, stored: Mapping[str, Stored], config: ModelConfig, family: Family
) -> list[TensorExtent]:
    """What quantised weights outside of layers are when they are dequantised; they have no bytes.

    Raises:
        CheckpointError: one is neither an embedding nor a head.
    """
    heads = [f"{name}.weight" for name in family.heads.union(HEADS)]
    made = []
    for each in dict.fromkeys(stored.values()):
        name = f"{each.module}.weight"
        if not ends_in(name, (*EMBEDDINGS, *heads)):
            raise CheckpointError(
                f"{folder}: {shown(each.module)}, which is in no layer, is quantised: only linear "
                "layers of decoder layers, embeddings and heads are read so"
            )
        some = next(iter(each.parts.values()))
        made.append(
            TensorExtent(
                name=name,
                dtype=_CODES.get(config.dtype or "", "BF16"),
                shape=(each.outputs, each.inputs),
                path=some.path,
                offset=some.offset,
                nbytes=0,
            )
        )
    return made


def _say_what_is_left_out(folder: Path, extents: list[TensorExtent]) -> None:
    if extents:
        _log.warning(
            "%s: %d tensors (%s) are left out, as the text network has no place for them, such as "
            "%s",
            shown(folder.name),
            len(extents),
            format_size(_nbytes(extents)),
            examples(extents),
        )


def _nbytes(extents: Iterable[TensorExtent]) -> int:
    return sum(extent.nbytes for extent in extents)


def in_file_order(extents: Iterable[TensorExtent]) -> tuple[TensorExtent, ...]:
    """Tensors as their bytes follow each other."""
    return tuple(sorted(extents, key=lambda extent: (extent.path, extent.offset, extent.nbytes)))


def _check_dtypes(
    folder: Path, extents: Iterable[TensorExtent], tensors: Mapping[str, TensorExtent]
) -> None:
    for extent in extents:
        matrix = extent.name.endswith(".weight") and len(extent.shape) > 1
        if extent.dtype in _UNSUPPORTED_DTYPES or (matrix and extent.dtype in _CODE_DTYPES):
            raise refuse_unstated(folder, extent, tensors.values())


def _has_row_per_token(extent: TensorExtent, config: ModelConfig) -> bool:
    rows, width = extent.shape if len(extent.shape) == 2 else (0, 0)
    return rows >= config.vocab_size and width == config.hidden_size


def _ends(
    folder: Path, extents: list[TensorExtent], config: ModelConfig, family: Family
) -> tuple[TensorExtent, TensorExtent | None, TensorExtent | None]:
    """Decide, for all of the package, what is the embedding and what is the output head.

    As transformers does (modeling_utils.py, `tie_weights`): a stored head that differs is used
    whatever config.json says. Unless that says they are two, of equal ones one serves as both, and
    so does the one that is stored alone.

    Returns:
        The embedding; the head, None where the embedding is it; a stored copy nobody needs.
    """
    embedding = _only(folder, extents, config, EMBEDDINGS, "token embeddings")
    heads = [f"{name}.weight" for name in family.heads.union(HEADS)]
    head = _only(folder, extents, config, heads, "heads")
    tied = config.tie_word_embeddings
    if embedding is not None and head is not None:
        if tied is not False and _equal(folder, embedding, head):
            return embedding, None, head
        if tied:
            _log.warning(HEAD_DIFFERS, shown(head.name))
        return embedding, head, None
    found = embedding or head
    if found is None or (embedding is None and tied is False):
        raise CheckpointError(
            f"{folder} has no token embedding (a tensor named like model.embed_tokens.weight): "
            "files are missing or this kind of model is not supported"
        )
    if tied is False:
        raise CheckpointError(
            f"{folder} has no head (lm_head.weight), but tie_word_embeddings is false in "
            "config.json: download the missing files, or set it to true"
        )
    return found, None, None


def _only(
    folder: Path,
    extents: list[TensorExtent],
    config: ModelConfig,
    names: Iterable[str],
    what: str,
) -> TensorExtent | None:
    """The one tensor of these names that has a row for each token."""
    named = [extent for extent in extents if ends_in(extent.name, names)]
    fitting = [extent for extent in named if _has_row_per_token(extent, config)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"{folder} has {len(fitting)} {what} ({shown(fitting[0].name)}, "
            f"{shown(fitting[1].name)}): this kind of model is not supported"
        )
    if named and not fitting:
        raise _misshapen(named[0], config)
    return fitting[0] if fitting else None


def _misshapen(extent: TensorExtent, config: ModelConfig) -> CheckpointError:
    return CheckpointError(
        f"{extent.path}, tensor {shown(extent.name)}, has shape {list(extent.shape)}, config.json "
        f"says vocab_size {config.vocab_size} and hidden_size {config.hidden_size}: files and "
        "config are not of one model"
    )


def _equal(folder: Path, one: TensorExtent, other: TensorExtent) -> bool:
    """Whether two tensors are equal; all bytes are read only where samples of them are.

    Coded ones are equal if their bytes are, as equal weights are coded alike.
    """
    nbytes = one.file_bytes
    if (one.dtype, one.shape, nbytes) != (other.dtype, other.shape, other.file_bytes):
        return False
    if not nbytes:  # of both quantised ends the bytes are not compared
        return False
    last = max(0, nbytes - _SAMPLE_BYTES)
    samples = [(last * i // (_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]
    blocks = [(start, _BLOCK_BYTES) for start in range(0, nbytes, _BLOCK_BYTES)]
    with (
        open_inside(folder, one.path.name) as ours,
        open_inside(folder, other.path.name) as theirs,
    ):
        for start, size in (*samples, *blocks):
            count = min(size, nbytes - start)
            if ours.read(count, one.offset + start) != theirs.read(count, other.offset + start):
                return False
    return True
