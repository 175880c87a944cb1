"""Which tokens heads can guess, and heads that begin as copies of the model's output head."""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from offload_rt.speculative.medusa.heads import MedusaHeads
from offload_rt.speculative.medusa.names import HeadsShape, LmHead
from offload_rt.training.corpus import NO_LABEL


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The model's output head: [V, E] weight, [V] bias if it has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """[R, E] to [R, V]."""
        return linear(state, self.weight, self.bias)

    def to(self, device: torch.device, dtype: torch.dtype) -> "OutputHead":
        """The same on a device, in the number format of a run."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return OutputHead(self.weight.to(device, dtype), bias)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of the rows of an output head.

    Attributes:
        tokens: [rows] int64; None where row and token are the same number.
        row_of: [V] int64 row of each token, `NO_LABEL` for those without.
    """

    tokens: torch.Tensor | None
    row_of: torch.Tensor

    @property
    def rows(self) -> int:
        """Rows of an output head for it."""
        return len(self.row_of if self.tokens is None else self.tokens)

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Tokens to rows; what has no row, or was no label, is `NO_LABEL`."""
        if self.tokens is None:
            return labels
        return torch.where(labels < 0, NO_LABEL, self.row_of[labels.clamp(min=0)])

    def to(self, device: torch.device) -> "Vocabulary":
        """The same on a device."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return Vocabulary(tokens, self.row_of.to(device))


def choose(counts: torch.Tensor, rows: int | None) -> Vocabulary:
    """The commonest tokens; all of them if that is not fewer.

    Args:
        counts: [V] how often each token is a label.
        rows: how many are wanted; 0 or None is all. Of fewer, those that never come are left out.
    """
    if not rows or rows >= len(counts):
        return Vocabulary(None, torch.arange(len(counts)))
    wanted = min(rows, int((counts > 0).sum()))
    order = torch.sort(counts, descending=True, stable=True).indices
    tokens = order[:wanted].sort().values
    row_of = torch.full((len(counts),), NO_LABEL)
    row_of[tokens] = torch.arange(wanted)
    return Vocabulary(tokens, row_of)


def new_heads(
    shape: HeadsShape, output: OutputHead, vocabulary: Vocabulary, seed: int
) -> MedusaHeads:
    """Heads that do nothing yet but what the model's output head does (arXiv:2401.10774, 2.1.1).

    Args:
        shape: what they consist of.
        output: the model's.
        vocabulary: tokens of the rows of their own output heads, if they have some.
        seed: of the blocks' biases.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MedusaHeads(shape, output)
    if shape.lm_head is LmHead.OWN:
        rows = output.weight if vocabulary.tokens is None else output.weight[vocabulary.tokens]
        for own in made.lm_heads:
            own.get_parameter("weight").data.copy_(rows)
    return made


def shape_of(heads: int, layers: int, width: int, own: Vocabulary | None) -> HeadsShape:
    """What heads consist of.

    Args:
        heads: how many.
        layers: residual blocks of each.
        width: of the hidden state.
        own: tokens of the output head each has; None lets them use the model's.
    """
    if own is None:
        return HeadsShape(heads=heads, layers=layers, hidden_size=width)
    return HeadsShape(
        heads=heads,
        layers=layers,
        hidden_size=width,
        lm_head=LmHead.OWN,
        head_rows=own.rows,
        truncated=own.tokens is not None,
    )
