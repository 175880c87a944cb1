"""What heads are trained to do, and how well they do it.

Shapes: R places, K heads, V rows of an output head.
"""

import math
from collections.abc import Iterable

import torch
from torch.nn.functional import cross_entropy

from offload_rt.speculative.medusa.calibration import RANKS, Calibration
from offload_rt.speculative.medusa.heads import MedusaHeads
from offload_rt.training.corpus import NO_LABEL
from offload_rt.training.vocabulary import Vocabulary

DECAY = 0.8  # lambda_k = 0.8^k, k = 1 for the first head (arXiv:2401.10774, 2.2.1)
_WARM_SHARE = 0.05


def head_weight(head: int) -> float:
    """What a head's loss counts; heads from 0."""
    return DECAY ** (head + 1)


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32 over the rows with a target; 0 if none has one.

    Args:
        logits: [R, V].
        targets: [R] rows of the output head, or `NO_LABEL`.
    """
    total = cross_entropy(logits.float(), targets, ignore_index=NO_LABEL, reduction="sum")
    return total / (targets != NO_LABEL).sum().clamp(min=1)


def rate_factor(step: int, steps: int) -> float:
    """Share of the highest learning rate: a short linear rise, then half a cosine to 0."""
    warm = max(1, round(_WARM_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Score:
    """Counts how often heads are right, and at which rank.

    Args:
        vocabulary: tokens of the heads' rows.
        heads: how many they are.
        ranks: to count.
    """

    def __init__(self, vocabulary: Vocabulary, heads: int, ranks: int = RANKS) -> None:
        self._vocabulary, self._ranks = vocabulary, ranks
        self._places = [0] * heads
        self._hits = [[0] * ranks for _ in range(heads)]

    def add(self, head: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count one head at some places; a token it has no row for is a miss.

        Args:
            head: which, from 0.
            logits: [R, V].
            labels: [R] tokens, `NO_LABEL` where there is none.
        """
        known = labels != NO_LABEL
        best = logits[known].topk(min(self._ranks, logits.shape[-1]), dim=-1).indices
        right = best == self._vocabulary.targets(labels[known])[:, None]
        self._places[head] += int(known.sum())
        for rank, hits in enumerate(right.sum(dim=0).tolist()):
            self._hits[head][rank] += hits

    def calibration(self, model: str, dtype: str) -> Calibration:
        """What was counted, for the trees of later runs."""
        hits = tuple(map(tuple, self._hits))
        return Calibration(model=model, dtype=dtype, places=tuple(self._places), hits=hits)

    def top(self, ranks: int) -> list[float]:
        """Per head, share of places where one of its likeliest tokens is right."""
        pairs = zip(self._hits, self._places, strict=True)
        return [sum(hits[:ranks]) / max(1, places) for hits, places in pairs]


def score_heads(
    heads: MedusaHeads,
    vocabulary: Vocabulary,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Score:
    """Count how often heads are right about [R, E] states and [R, K] labels."""
    score = Score(vocabulary, heads.shape.heads)
    with torch.inference_mode():
        for hidden, labels in batches:
            for head in range(heads.shape.heads):
                score.add(head, heads.head(head, hidden), labels[:, head])
    return score
