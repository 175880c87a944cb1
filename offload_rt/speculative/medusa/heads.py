"""Medusa heads: guesses of what follows the next token, from the hidden state that made it.

As in Medusa, arXiv:2401.10774, 2.1.1, and upstream's `medusa_model.py`, whose linear layers have a
bias the paper leaves out. Blocks are modules of their own, also where a head has several.
Upstream's are one module used again, so their weights are the same.

Shapes: R hidden states, E hidden size, K heads, V tokens (or rows of a truncated vocabulary).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import silu

from offload_rt.speculative.medusa.names import HeadsShape, LmHead


class ResBlock(nn.Module):
    """x + SiLU(Wx + b); W starts at zero, so a new block is nearly the identity."""

    def __init__(self, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=bias)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., E] to [..., E]."""
        return hidden + silu(self.linear(hidden))


class MedusaHeads(nn.Module):
    """K heads on one hidden state; its tensors are named as `HeadsShape.tensors` says.

    Args:
        shape: what they consist of.
        model_head: the model's own output head, [..., E] to [..., V], for heads that share it.
    """

    def __init__(
        self, shape: HeadsShape, model_head: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self._model_head = model_head
        size, rows = shape.hidden_size, shape.head_rows
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResBlock(size, shape.bias) for _ in range(shape.layers))
            for _ in range(shape.heads)
        )
        if shape.lm_head is LmHead.OWN:
            self.lm_heads = nn.ModuleList(
                nn.Linear(size, rows, bias=False) for _ in range(shape.heads)
            )
        elif shape.lm_head is LmHead.COMMON:
            self.lm_head = nn.Linear(size, rows, bias=False)

    def states(self, hidden: torch.Tensor, heads: int) -> torch.Tensor:
        """The state of each head before its output head.

        Args:
            hidden: [R, E] hidden states after the model's final norm: what its output head is fed.
            heads: the first K are evaluated.

        Returns:
            [K, R, E].
        """
        states = []
        for blocks in self.blocks[:heads]:
            state = hidden
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList of ResBlocks
                state = block(state)
            states.append(state)
        return torch.stack(states)

    def head(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of one head, [R, E] to [R, V]: what training computes at a time."""
        state = hidden
        for block in self.blocks[index]:  # type: ignore[attr-defined]  # as in `states`
            state = block(state)
        logits: torch.Tensor
        if self.shape.lm_head is LmHead.OWN:
            logits = self.lm_heads[index](state)
        elif self.shape.lm_head is LmHead.COMMON:
            logits = self.lm_head(state)
        else:
            assert self._model_head is not None
            logits = self._model_head(state)
        return logits

    def forward(self, hidden: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """Logits of the tokens 2, 3, ... places after the one that made each hidden state.

        Args:
            hidden: [R, E], see `states`.
            heads: how many of them are evaluated; None is all.

        Returns:
            [K, R, V]; of a truncated vocabulary, V are its rows.
        """
        states = self.states(hidden, self.shape.heads if heads is None else heads)
        if self.shape.lm_head is LmHead.OWN:
            pairs = zip(self.lm_heads[: len(states)], states, strict=True)
            return torch.stack([head(state) for head, state in pairs])
        if self.shape.lm_head is LmHead.COMMON:
            logits: torch.Tensor = self.lm_head(states)
            return logits
        assert self._model_head is not None  # whoever made heads without their own set it
        return self._model_head(states)
