"""How much device memory a run needs, from headers and configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload_rt.model.checkpoint import DTYPE_BYTES, Checkpoint
from offload_rt.model.config import ModelConfig
from offload_rt.model.layout import FLOATS, Packing, compute_dtype, plan_layout
from offload_rt.planning.placement import Demand

# What a run costs besides what is counted below: code pages and buffers of the math libraries that
# are touched for the first time, thread stacks, allocator slack. Measured on CPU (README, results).
RUNTIME_BYTES = 64 * 2**20
SCORE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """The largest pass a run will make.

    Attributes:
        rows: tokens of all sequences in it.
        chunk_rows: tokens that go through a layer at once.
        logit_rows: rows whose logits are read.
        longest: tokens of the longest sequence, answer included.
    """

    rows: int
    chunk_rows: int
    logit_rows: int
    longest: int


def demand_of(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    packing: Packing,
    capacities: Sequence[int],
    shape: PassShape,
) -> Demand:
    """Size everything a run keeps on the device.

    Args:
        checkpoint: headers of the model.
        dtype: `auto` or torch's name of the number format of the computation.
        packing: how layer images are laid out.
        capacities: KV rows of each sequence.
        shape: the largest pass.
    """
    config = checkpoint.config
    name = compute_dtype(config.dtype, checkpoint.tensors.values(), dtype)
    number_bytes = DTYPE_BYTES[{v: k for k, v in FLOATS.items()}[name]]
    layers = [plan_layout(layer, "", name, packing).nbytes for layer in checkpoint.layers]
    return Demand(
        layer_bytes=tuple(layers),
        base_bytes=plan_layout(checkpoint.others, "", name, packing).nbytes,
        kv_bytes=kv_bytes_per_token(config, number_bytes) * sum(capacities),
        workspace_bytes=workspace_bytes(config, number_bytes, shape),
    )


def kv_bytes_per_token(config: ModelConfig, number_bytes: int) -> int:
    """KV bytes one token takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * number_bytes


def workspace_bytes(config: ModelConfig, number_bytes: int, shape: PassShape) -> int:
    """Upper bound of what a pass allocates and frees again.

    All rows: the hidden state twice (a layer's input and what replaces it), a normalised copy and
    the rotary tables. One chunk: fp32 copies of the norm, query, key, value and their rotated
    copies, the MLP's three products and a packed copy of its largest weight, the attention mask as
    bool and as numbers, and a block of scores. Read rows: logits, and for sampling their fp32
    copies, an fp64 sum and a sort order.
    """
    chunk = min(shape.chunk_rows, shape.rows)
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    per_row = 4 * config.hidden_size * number_bytes + 2 * config.head_dim * 4
    per_chunk_row = (
        8 * config.hidden_size + (2 * heads + 4 * config.intermediate_size) * number_bytes
    )
    packed_weight = config.intermediate_size * config.hidden_size * number_bytes if chunk > 1 else 0
    mask = chunk * shape.longest * (1 + number_bytes) if chunk > 1 else 0
    logits = shape.logit_rows * config.vocab_size * (number_bytes + 32)
    return (
        RUNTIME_BYTES
        + shape.rows * per_row
        + chunk * per_chunk_row
        + packed_weight
        + mask
        + min(SCORE_BYTES, 2 * config.num_heads * chunk * shape.longest * 4)
        + logits
    )
