"""Sizes that follow from headers and a number format: images, rows of KV, a pass's workspace.

No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from pathlib import Path

from offload_rt.attention.blocks import GROUPED_FROM, KEY_BLOCK, PIECE, SCORE_BYTES, TILE
from offload_rt.config import DraftWeights
from offload_rt.device.base import PIECE_BYTES, STAGING_BYTES
from offload_rt.device.kinds import DeviceKind, Flash
from offload_rt.device.system import processor
from offload_rt.model.checkpoint import DTYPE_BYTES, Checkpoint
from offload_rt.model.config import ModelConfig
from offload_rt.model.ends import head_is_stored
from offload_rt.model.expert_layout import ExpertImages, plan_images
from offload_rt.model.formats.base import embedding_bytes, in_panels, matrix_bytes, takes
from offload_rt.model.formats.stored import scratch_bytes
from offload_rt.model.kept import layers_keep
from offload_rt.model.layout import CODES, LayerLayout, compute_dtype, plan_layouts
from offload_rt.model.packed_files import code_name
from offload_rt.profiling.rates import LAYER_KERNELS, OTHER_KERNELS

# What a run costs besides what is counted below: code pages and buffers of the math libraries that
# are touched for the first time, thread stacks, allocator slack. Measured on CPU
# (docs/RESULTS.md, "Streaming against raw reads").
RUNTIME_BYTES = 64 * 2**20
# What a command on a CPU takes besides its device memory, 384 to 409 MiB: 320 for Python with torch
# and transformers, 90 for the process of a tokenizer of 152,000 tokens; and what of it only torch's
# build for GPUs has (docs/RESULTS.md, "Memory beside the device memory").
_PROCESS_BYTES, BUILD_FOR_GPUS_BYTES = 420 * 2**20, 80 * 2**20
ROW_BYTES = 64  # of a row of a pass: its id and its place, and what is made of them on the way
# Families whose file need not say which layers have a window: all but every n-th.
_ALTERNATING = {
    "gemma2": 2,
    "gpt_oss": 2,
    "gemma3_text": 6,
    "cohere2": 4,
    "exaone4": 4,
    "olmo3": 4,
    "beam": 6,
}
_ENDS_FULL = {"beam"}  # of these families, the last layer attends to everything in any case
# Rows are made probabilities of in parts: each takes 32 bytes per id. On a CPU a part is so many
# rows, on a GPU so many ids. A kernel that reads and writes those takes 37 us of a 4090 (bound: 8
# bytes an id at 0.9 TB/s), its launch 5 us of the host, so larger parts would only be larger.
DRAW_ROWS, DRAW_IDS = 4, 2**22

RECORDED_ROWS = 32  # of a recorded pass; more are made once in a while, as those of a prompt
# Rows whose scores it writes out, at most: `FLOOR_ROWS` (kv/static.py), and those of a draft.
RECORDED_SPAN = 2048
# Recordings of a model that are kept. One that grows trees needs about one for each of its passes,
# anew each time the sequence has grown by `FLOOR_ROWS`.
MOST_RECORDINGS = 64
# Rows of a pass that is recorded in pieces (`runner/pieces.py`), and kinds of it that are kept.
PIECED_ROWS, MOST_PIECED = 8, 4
KERNEL_BYTES = 2**10  # of each kernel of a recording on the device, beside its pool; assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """The largest pass a run will make.

    Attributes:
        rows: tokens of all sequences in it.
        chunk_rows: tokens that go through a layer at once.
        logit_rows: rows whose logits are read.
        longest: tokens of the longest sequence, answer included.
        tile: where a device's row-invariant passes go through layers in tiles, their rows; else 0.
        tree_rows: of the largest draft that is checked, its root included; 0: nothing is.
    """

    rows: int
    chunk_rows: int
    logit_rows: int
    longest: int
    tile: int = 0
    tree_rows: int = 0


@lru_cache(maxsize=8)  # a search asks for the same ones hundreds of times
def layouts_of(checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> tuple[LayerLayout, ...]:
    """The image of each layer, and last of what is in no layer."""
    return plan_layouts(checkpoint, compute_dtype(checkpoint, dtype), device.packing)


@lru_cache(maxsize=8)
def experts_of(checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> ExpertImages | str:
    """How a model lies whose experts are streamed one by one; why its layers are streamed whole.

    Which tensors are experts is asked of transformers' modules, which takes the seconds that
    importing torch does, for models that have some.

    Raises:
        CheckpointError: experts of a layer are not alike, or a tensor of all does not divide.
    """
    if not checkpoint.has_experts:
        return ""
    from offload_rt.model import network

    name = compute_dtype(checkpoint, dtype)
    found = network.experts_of(checkpoint, name)
    return found.reason or plan_images(checkpoint, found, name, device.packing)


def image_bytes(checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> list[int]:
    """Sizes of the same."""
    return [layout.nbytes for layout in layouts_of(checkpoint, dtype, device)]


def staging_bytes(layouts: Sequence[LayerLayout], device: DeviceKind, readers: int) -> int:
    """What readers read through when bytes cannot land in place, where that is the device's."""
    if device.own_memory:
        return 0
    in_place = all(run.in_place for layout in layouts for run in layout.runs)
    return 0 if in_place else 2 * readers * STAGING_BYTES


def ahead_bytes(layer_bytes: int, readers: int) -> int:
    """Host memory that layers in files are read ahead into (`streaming/ahead.py`).

    Buffers of a piece each, for the largest layer and what is being read meanwhile.
    """
    return (-(-layer_bytes // PIECE_BYTES) + readers) * STAGING_BYTES


def process_bytes() -> int:
    """What the processes of a command on a CPU take besides its device memory. No torch here."""
    torch = find_spec("torch")
    places = (torch and torch.submodule_search_locations) or []
    for_gpus = any(Path(place, "lib", "libtorch_cuda.so").exists() for place in places)
    return _PROCESS_BYTES - (0 if for_gpus else BUILD_FOR_GPUS_BYTES)


PACKED = "bf16 in "  # what packed folders are begins with it


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSizes:
    """The quantised weights of a model.

    Attributes:
        method: what they are; where they are stored in several forms, which.
        weights: numbers in them.
        file_bytes: in the files.
        wire_bytes: on the link, and in an image.
        rounded: to what they are rounded when they are loaded; None: the files have them so.
        computed_bytes: dequantised.
        scratch_bytes: device memory in which that is done.
    """

    method: str
    weights: int
    file_bytes: int
    wire_bytes: int
    rounded: str | None
    computed_bytes: int
    scratch_bytes: int


def stored_sizes(checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> StoredSizes | None:
    """The sizes of a model's quantised weights; None where there are none."""
    if not checkpoint.stored:
        return None
    stored = dict.fromkeys(checkpoint.stored.values())
    weights = sum(each.numbers for each in stored)
    forms = sorted({str(each.form) for each in stored})
    several = f" ({', '.join(forms)})" if len(forms) > 1 else ""
    method = checkpoint.config.quantised
    coded = f"{PACKED}{code_name(next(iter(stored)).bits)} bits" if method is None else ""
    return StoredSizes(
        method=coded if method is None else f"{method.name}{several}",
        weights=weights,
        file_bytes=sum(each.file_bytes for each in stored),
        wire_bytes=sum(each.nbytes for each in stored),
        rounded=None if checkpoint.rounded is None else str(checkpoint.rounded),
        computed_bytes=weights * number_bytes_of(checkpoint, dtype),
        scratch_bytes=decoding_bytes(checkpoint, dtype, device),
    )


def decoding_bytes(checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> int:
    """What dequantising needs besides images and workspace; 0 where nothing is quantised."""
    number_bytes = number_bytes_of(checkpoint, dtype)
    return scratch_bytes(checkpoint.stored.values(), number_bytes, device.processor)


def head_bytes(checkpoint: Checkpoint, weights: DraftWeights, dtype: str) -> int:
    """A rounded output head of a model computed in that format; 0 where it stays as it is."""
    shape = (checkpoint.head or checkpoint.embedding).shape
    if head_is_stored(checkpoint):
        return 0
    name = compute_dtype(checkpoint, dtype)
    return matrix_bytes(weights, *shape, dtype=name) if takes(weights, *shape) else 0


def packs(checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> bool:
    """Whether weights that stay are reordered, as `formats/packed.can_pack` says with torch."""
    bf16 = compute_dtype(checkpoint, dtype) == "bfloat16"
    return device.packs and bf16 and bool(processor()[1])


def packed_head_bytes(checkpoint: Checkpoint, number_bytes: int) -> int:
    """A reordered copy of the output head (`formats/packed.py`)."""
    return prod((checkpoint.head or checkpoint.embedding).shape) * number_bytes


def draft_base_bytes(checkpoint: Checkpoint, weights: DraftWeights, device: DeviceKind) -> int:
    """What of a draft model is in no layer; where its head is rounded, its embedding is, too.

    Args:
        checkpoint: headers of the draft model.
        weights: how they are kept, `auto` settled.
        device: what computes.
    """
    *_, base = layouts_of(checkpoint, "auto", device)
    embedding, head = checkpoint.embedding, checkpoint.head or checkpoint.embedding
    if not takes(weights, *head.shape):
        return base.nbytes
    ends = {embedding.name, head.name}
    total = sum(p.nbytes for p in base.placements if p.name not in ends)
    total += head_bytes(checkpoint, weights, "auto")
    name = compute_dtype(checkpoint, "auto")
    one = len(ends) == 1 and device.host_computes
    if one and in_panels(*head.shape, dtype=name):
        return total  # its rows are looked up where the head has them
    return total + embedding_bytes(*embedding.shape)


def number_bytes_of(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of a number in the format the model computes in."""
    return DTYPE_BYTES[CODES[compute_dtype(checkpoint, dtype)]]


def kv_row_bytes(config: ModelConfig, number_bytes: int) -> tuple[int, ...]:
    """KV bytes one token takes in each layer; 0 in one that does not attend."""
    return tuple(kept.kv_numbers * number_bytes for kept in layers_keep(config))


def kv_bytes_per_token(config: ModelConfig, number_bytes: int) -> int:
    """KV bytes one token takes in all layers."""
    return sum(kv_row_bytes(config, number_bytes))


def state_bytes(
    config: ModelConfig, number_bytes: int, *, rows: int, pending: int
) -> tuple[int, ...]:
    """What each layer keeps of a sequence besides KV (`kv/states.py`); 0 without a state.

    The state at the anchor and at the end of the newest prompt, and the inputs since then.

    Args:
        config: of the model.
        number_bytes: of its number format.
        rows: of a piece.
        pending: rows of the largest pass that checks a draft.
    """
    inputs = (3 * rows + 2 * pending) * config.hidden_size * number_bytes  # twice while a pass adds
    kept = [layer.state_bytes(number_bytes) for layer in layers_keep(config)]
    return tuple(2 * nbytes + inputs if nbytes else 0 for nbytes in kept)


def mixing_bytes(config: ModelConfig, number_bytes: int, tree_rows: int, device: DeviceKind) -> int:
    """Upper bound of what a layer with a state allocates and frees again, but for its rows.

    States while pieces follow each other, one more for each whole piece down a tree, and for a
    piece some sixteen fp32 numbers for each of its rows and each channel of the convolution, which
    are at most a quarter of its newest inputs.
    """
    states = 4 + tree_rows // device.state_rows
    each = [
        states * kept.state_bytes(number_bytes) + device.state_rows * 16 * kept.conv_numbers
        for kept in layers_keep(config)
    ]
    return max(each)


def layer_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """For each layer how many of the newest tokens it attends to; None: all of them."""
    window, layers = config.sliding_window, config.num_layers
    kinds = config.setting("layer_types")
    if window is None:
        return (None,) * layers
    if isinstance(kinds, list):
        slides = ["sliding" in str(kind) for kind in kinds]
    elif (every := _full_every(config)) is not None:
        ends = layers - 1 if config.model_type in _ENDS_FULL else -1
        slides = [(i + 1) % every != 0 and i != ends for i in range(layers)]
    else:
        first = config.setting("max_window_layers")
        slides = [i >= first if isinstance(first, int) else True for i in range(layers)]
    return tuple(window if slide else None for slide in slides)


def _full_every(config: ModelConfig) -> int | None:
    """Every how many layers one attends to everything, where the family alternates."""
    if config.model_type not in _ALTERNATING:
        return None
    stated = config.setting("sliding_window_pattern")
    return stated if isinstance(stated, int) and stated > 0 else _ALTERNATING[config.model_type]


def drawn_rows(device: DeviceKind, rows: int, vocab: int) -> int:
    """How many of these rows of logits are made probabilities of at once."""
    most = DRAW_ROWS if device.host_computes else max(DRAW_ROWS, DRAW_IDS // vocab)
    return min(rows, most)


def newest_rows(nodes: int) -> int:
    """Hidden states of a sequence that wait for its next draft.

    One that was read already, those of a pass that accepted a whole draft of so many nodes, and one
    of a last pass without a draft.
    """
    return nodes + 3


def held_rows(nodes: int, capacities: Sequence[int], pass_rows: int) -> int:
    """Hidden states of all sequences together that are kept until they are read.

    As many as a pass makes, and beside them a few of each sequence.
    """
    return min(sum(capacities), pass_rows + len(capacities) * newest_rows(nodes))


def recorded_bytes(config: ModelConfig, number_bytes: int, device: DeviceKind) -> int:
    """Upper bound of what recorded draft passes of a model keep; 0 where none are recorded.

    The pool that all of them share, as large as the largest pass, their logits, and the recordings
    themselves. The libraries' workspace is in that of a run.
    """
    if not device.records:
        return 0
    pool = PassShape(
        rows=RECORDED_ROWS,
        chunk_rows=RECORDED_ROWS,
        longest=RECORDED_SPAN,
        logit_rows=RECORDED_ROWS,
    )
    logits = RECORDED_ROWS * config.vocab_size * number_bytes
    pool_bytes = workspace_bytes(config, number_bytes, pool, device) - RUNTIME_BYTES
    kernels = config.num_layers * LAYER_KERNELS + OTHER_KERNELS
    return pool_bytes + logits + MOST_RECORDINGS * kernels * KERNEL_BYTES


def pieced_bytes(config: ModelConfig, number_bytes: int, device: DeviceKind) -> int:
    """Upper bound of what passes that are recorded in pieces keep.

    Of each what a piece leaves to later ones and to steps, what these make, and the recording; of
    all together the pool they compute in.
    """
    pool = PassShape(rows=PIECED_ROWS, chunk_rows=PIECED_ROWS, longest=1, logit_rows=PIECED_ROWS)
    pool_bytes = workspace_bytes(config, number_bytes, pool, device) - RUNTIME_BYTES
    # Queries, keys, values, what is attended; states beside these and experts, and their results.
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    layer = PIECED_ROWS * (heads + 6 * config.hidden_size) * number_bytes + 16 * 512  # of each 512
    logits = PIECED_ROWS * config.vocab_size * number_bytes
    kernels = config.num_layers * LAYER_KERNELS + OTHER_KERNELS
    return pool_bytes + MOST_PIECED * (config.num_layers * layer + logits + kernels * KERNEL_BYTES)


def workspace_bytes(
    config: ModelConfig, number_bytes: int, shape: PassShape, device: DeviceKind
) -> int:
    """Upper bound of what a pass allocates and frees again.

    All rows: the hidden state, of which each chunk is replaced where it lies, once more (scaled, or
    what a pass of one chunk makes of it) or the rotary tables while they are made, in fp32. One
    chunk: fp32 copies of the norm, query, key, value and their rotated
    copies, the MLP's three products and on a CPU a packed copy of its largest weight, and what
    attention needs. Read rows: logits, and for sampling their fp32 copies, an fp64 sum and a sort
    order.
    """
    chunk = shape.tile or min(shape.chunk_rows, shape.rows)
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    hidden = config.hidden_size * number_bytes
    per_row = hidden + max(hidden, 24 * config.head_dim) + ROW_BYTES
    per_chunk_row = (
        8 * config.hidden_size + (2 * heads + 4 * config.intermediate_size) * number_bytes
    )
    packs = chunk > 1 and not device.own_memory  # a GPU's library multiplies what lies there
    packed_weight = config.intermediate_size * config.hidden_size * number_bytes if packs else 0
    drawn = drawn_rows(device, shape.logit_rows, config.vocab_size)
    logits = config.vocab_size * (shape.logit_rows * number_bytes + drawn * 32)
    return (
        RUNTIME_BYTES
        + shape.rows * per_row
        + chunk * per_chunk_row
        + mixing_bytes(config, number_bytes, shape.tree_rows, device)
        + packed_weight
        + attention_bytes(config, number_bytes, shape, device)
        + logits
    )


def attention_bytes(
    config: ModelConfig, number_bytes: int, shape: PassShape, device: DeviceKind
) -> int:
    """Upper bound of what attention of one layer allocates and frees again.

    Its mask, as bool (with copies while it is made) and as numbers. Where scores are written out
    (all of them, or those of a tree): fp32 copies of a block of keys and values, and the scores of
    some rows in four versions. Results of parts, which are merged eight at a time; of a chain or a
    tree there are up to four. In tiles keys and values of each row's piece besides, by rows and as
    they are stored, and scores of all heads at once; rows of a tree may each have a past of their
    own, with a last part and a result (`attention/fixed.py`).
    """
    if shape.tile:
        pasts = 2 * min(shape.tile, shape.logit_rows)
        keys, kept = config.num_kv_heads * config.head_dim, config.num_heads * shape.tile
        copies = 2 * keys * (4 * KEY_BLOCK + PIECE * shape.tile * (4 + number_bytes))
        return copies + kept * 4 * (4 * (KEY_BLOCK + PIECE) + (16 + pasts) * config.head_dim)
    chunk, keys = min(shape.chunk_rows, shape.rows), min(shape.longest, KEY_BLOCK) + PIECE
    mask = chunk * _masked_keys(config, shape, device) * (3 + number_bytes) if chunk > 1 else 0
    tiled = max(config.num_heads * chunk, config.num_kv_heads * TILE)
    copies = 2 * config.num_kv_heads * keys * config.head_dim * 4
    scores = 4 * min(SCORE_BYTES, tiled * keys * 4)
    parts = 12 if config.writes_out_scores else 4
    return mask + copies + scores + parts * tiled * config.head_dim * 4


def _masked_keys(config: ModelConfig, shape: PassShape, device: DeviceKind) -> int:
    """Keys that one mask covers, at most (`attention/rows.py`, `attention/partial.py`)."""
    if config.sliding_window is not None:
        return shape.longest  # of KV that is offloaded, the rows of a block
    if config.writes_out_scores or device.flash is Flash.LOWER_RIGHT:
        return min(shape.longest, KEY_BLOCK)
    return min(shape.longest, GROUPED_FROM + shape.rows)
