"""TriForce: the target's own weights draft from a retrieval cache, and are drafted for themselves.

After arXiv:2404.11912. The outer draft is made by the same draft-verify loop as the answer, with
other parts: a drafter proposes a few tokens (`inner`), one pass of the target over the retrieval
cache checks them with the one verifier, and the accepted ones are the next piece of the outer
draft. Its law is therefore exactly that of the target over the retrieval cache, so those
probabilities are a legal proposal for the outer verification. (The published code samples the
retrieval model's distribution instead of the residual at a rejection, and is not exact.)
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from offload_rt.config import AcceptRule, DraftConfig, SamplingConfig
from offload_rt.device.base import Device
from offload_rt.errors import NumbersError
from offload_rt.kv.base import KVCache
from offload_rt.kv.followed import FollowedKV
from offload_rt.report import RetrievalCounts
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import Dice, target_probs
from offload_rt.speculative.base import Draft, Drafter, Laws, Unlearned, Verdict
from offload_rt.speculative.deciding import Checked, decide
from offload_rt.speculative.growing import NO_NUMBERS

# The retrieval cache is built anew when, over that many drafts, less than that share was accepted.
# Both are guesses; a build is nearly free, since the pass it is part of is made anyway.
ROLLING_DRAFTS, REBUILD_BELOW = 4, 0.5


class TargetPass(Protocol):
    """A pass of the target over another cache than the answer's."""

    def __call__(self, cache: KVCache, root: int, tree: TokenTree) -> torch.Tensor:
        """Return [N + 1, V] logits after the root and after each node; rows stay pending."""


class TriForceDrafter(Unlearned):
    """Drafts a chain for one sequence.

    Args:
        device: where passes run.
        target: runs the target's weights over the retrieval cache.
        cache: the sequence's full cache and the retrieval cache that follows it.
        inner: proposes tokens for the draft.
        config: how many.
    """

    name = "triforce"

    def __init__(
        self,
        device: Device,
        target: TargetPass,
        cache: FollowedKV,
        inner: Drafter,
        config: DraftConfig,
    ) -> None:
        self._device, self._target, self._cache, self._inner = device, target, cache, inner
        self._gamma, self._inner_gamma = config.nodes, config.inner.nodes
        self._sampling = SamplingConfig()
        self._dice: Dice | None = None
        self._rates: deque[float] = deque(maxlen=ROLLING_DRAFTS)
        self._share: float | None = None  # of the build the last draft was made with, if it matters
        self.counts = RetrievalCounts()

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        """Start a new answer.

        Args:
            sampling: draft tokens are drawn from the same filtered distribution as the target's.
            generator: source of randomness.
        """
        self._sampling = sampling
        self._dice = Dice(generator, self._device.torch_device)  # the answer has another

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Generate a chain with the retrieval cache; nothing while that is not built."""
        gamma = self._gamma if max_nodes is None else min(max_nodes, self._gamma)
        depth, retrieval = min(max_depth, gamma), self._cache.retrieval
        if depth < 1 or retrieval.built_at is None:
            return Draft()
        self._share = None if retrieval.is_complete else self._cache.choice.current
        tokens: list[int] = []
        laws = Laws(depth)
        try:
            while len(tokens) < depth:
                tokens += self._extend([*ids, *tokens], depth - len(tokens), laws)
        finally:
            retrieval.truncate(len(ids) - 1)
        return Draft(TokenTree.chain(tokens), laws.rows)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Note what is accepted; when that is little, have the retrieval cache built anew."""
        drafted, accepted = len(draft.tree), len(verdict.path)
        if not drafted:
            return
        if self._share is not None:
            judged = min(accepted + 1, drafted)
            self._cache.choice.note(self._share, accepted=accepted, judged=judged)
        self._rates.append(accepted / drafted)
        if len(self._rates) == ROLLING_DRAFTS and sum(self._rates) < REBUILD_BELOW * ROLLING_DRAFTS:
            self._cache.wants_build = True
            self._rates.clear()

    def forget(self) -> None:
        """Forget what the drafter below kept; the retrieval cache goes with the full one."""
        self._inner.forget()
        self._rates.clear()

    def _extend(self, ids: Sequence[int], room: int, laws: Laws) -> list[int]:
        """One draft-verify step of the retrieval model.

        Args:
            ids: the sequence with what is drafted so far.
            room: tokens at most.
            laws: gets, unless greedy, the distribution each token was drawn from.

        Returns:
            At least one and at most `room` tokens.
        """
        assert self._dice is not None  # begin set it
        retrieval, sampling = self._cache.retrieval, self._sampling
        draft = Draft()
        if room > 1:
            draft = self._inner.propose(ids, min(self._inner_gamma, room - 1))
        logits = self._target(retrieval, ids[-1], draft.tree)
        checked = Checked(ids, draft, logits, self._dice, sampling, self._inner)
        (verdict,) = decide([checked], self._device, AcceptRule.LOSSLESS)
        if verdict is None:
            raise NumbersError(NO_NUMBERS)
        retrieval.commit(verdict.rows)
        self._inner.observe(draft, verdict)
        self.counts.add(drafted=len(draft.tree), accepted=len(verdict.path))
        tokens = [*(draft.tree.tokens[node] for node in verdict.path), verdict.token]
        if not sampling.greedy:
            for row in verdict.rows:
                laws.add(target_probs(logits[row : row + 1], sampling))
        return tokens
