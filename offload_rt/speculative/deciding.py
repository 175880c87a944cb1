"""What a pass over drafts decides: the accepted tokens, and what their drafters learn of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch

from offload_rt.config import AcceptRule, SamplingConfig
from offload_rt.device.base import Device
from offload_rt.sampling import NO_TOKEN, Dice, likeliest
from offload_rt.speculative.base import Draft, Drafter, Verdict
from offload_rt.speculative.ngram.followers import Likely, pack_likely
from offload_rt.speculative.verifier import draw, walk


@dataclass(frozen=True, slots=True)
class Checked:
    """A draft behind a sequence, and what a model says of it.

    Attributes:
        ids: the sequence; its last token is the root of the draft.
        draft: N nodes, or none.
        logits: [N + 1, V] after the root and after each node.
        dice: the sequence's randomness.
        sampling: how the model's tokens are drawn.
        drafter: learns the target's likeliest tokens, if it wants to.
    """

    ids: Sequence[int]
    draft: Draft
    logits: torch.Tensor
    dice: Dice
    sampling: SamplingConfig
    drafter: Drafter | None = None

    @property
    def learns(self) -> bool:
        """Whether its drafter wants to know what the model finds likely."""
        return self.drafter is not None and self.drafter.learns


def decide(checked: Sequence[Checked], device: Device, rule: AcceptRule) -> list[Verdict | None]:
    """Decide about drafts of several sequences with one host sync.

    Dice go on by the tokens each sequence gains, and drafters learn.

    Args:
        checked: drafts and logits.
        device: that the logits are on.
        rule: when a drafted token is accepted.

    Returns:
        None for a sequence whose path ends where its logits are no numbers; its dice have not gone
        on.
    """
    parts = []
    for one, made in zip(checked, _drawn(checked, rule, device), strict=True):
        parts += [made, pack_likely(one.logits) if one.learns else made.new_empty(0)]
    flat = device.download(torch.cat(parts))  # host sync
    ends = list(accumulate(part.numel() for part in parts))
    numbers = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    pairs = list(zip(checked, numbers[::2], strict=True))
    verdicts: list[Verdict | None] = []
    for (one, drawn), likely in zip(pairs, numbers[1::2], strict=True):
        verdict = walk(one.draft, drawn, one.sampling, rule)
        if verdict.token == NO_TOKEN:
            verdicts.append(None)
            continue
        verdicts.append(verdict)
        one.dice.advance(len(verdict.path) + 1)
        if one.drafter is not None and likely:
            found = Likely.read(likely, drawn[-len(one.logits) :])
            one.drafter.learn(one.ids, one.draft.tree, found)
    return verdicts


def _drawn(checked: Sequence[Checked], rule: AcceptRule, device: Device) -> list[torch.Tensor]:
    """What `draw` makes of each; of greedy ones whose logits lie in a row, at once."""
    found: list[torch.Tensor] = []
    for greedy, some in groupby(checked, key=lambda one: one.sampling.greedy):
        if not greedy:
            found += [draw(o.draft, o.logits, o.sampling, rule, o.dice, device) for o in some]
            continue
        rows = [one.logits for one in some]
        tokens = torch.cat([likeliest(run) for run in _runs(rows)])
        found += tokens.split([len(part) for part in rows])
    return found


def _runs(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same rows [n, V] as few tensors as there can be: those that lie one behind the other."""
    runs: list[torch.Tensor] = []
    for part in parts:
        last = runs[-1] if runs else None
        if last is not None and _follows(last, part):
            shape = len(last) + len(part), part.shape[1]
            runs[-1] = last.as_strided(shape, last.stride(), last.storage_offset())
        else:
            runs.append(part)
    return runs


def _follows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether rows lie behind others."""
    behind = one.storage_offset() + len(one) * one.stride(0) == other.storage_offset()
    same = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return bool(behind and same and one.stride() == other.stride())
