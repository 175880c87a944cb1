"""Embeddings whose rows are kept otherwise: rounded, or where the output head has them."""

from collections.abc import Callable
from typing import Any

import torch

_AT_ONCE = 2**20  # numbers of rows that are found at once: they lie beside the result a few times


def stripped(embedding: torch.nn.Embedding) -> torch.nn.Embedding:
    """The same without its weight [V, E], for `looked_up`."""
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[:0].to("meta"), False)
    embedding.padding_idx = None  # of training; a row's number is another one here
    return embedding


def looked_up(
    embedding: torch.nn.Embedding,
    found: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
) -> torch.Tensor:
    """What an embedding's class does with rows (families scale them), some after the other.

    Args:
        embedding: without its weight.
        found: rows [N, E] by their numbers [N].
        ids: [...].

    Returns:
        [..., E].
    """
    flat, size = ids.flatten(), embedding.embedding_dim
    count = max(1, _AT_ONCE // size)
    if len(flat) <= count:
        return _by_class(embedding, found(flat)).view(*ids.shape, size)
    first = _by_class(embedding, found(flat[:count]))
    made = first.new_empty(len(flat), size)
    made[:count] = first
    del first
    for start in range(count, len(flat), count):
        part = slice(start, start + count)
        made[part] = _by_class(embedding, found(flat[part]))
    return made.view(*ids.shape, size)


def _by_class(embedding: torch.nn.Embedding, rows: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(rows.shape[0], device=rows.device)
    weights: dict[str, Any] = embedding._parameters
    saved = weights["weight"]
    # As a parameter it would be another tensor, which passes in pieces take for one that stays.
    weights["weight"] = rows
    try:
        made: torch.Tensor = embedding(numbers)
    finally:
        weights["weight"] = saved
    return made
