"""Embeddings whose rows are kept otherwise: rounded, or where the output head has them."""

from collections.abc import Sequence

import torch


def stripped(embedding: torch.nn.Embedding) -> torch.nn.Embedding:
    """The same without its weight [V, E], for `looked_up`."""
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[:0].to("meta"), False)
    embedding.padding_idx = None  # of training; a row's number is another one here
    return embedding


def looked_up(
    embedding: torch.nn.Embedding, rows: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """What an embedding's class does with rows [N, E] (families scale them): [*shape, E]."""
    numbers = torch.arange(rows.shape[0], device=rows.device).view(*shape)
    saved = embedding.weight
    embedding.weight = torch.nn.Parameter(rows, False)
    try:
        found: torch.Tensor = embedding(numbers)
    finally:
        embedding.weight = saved
    return found
