"""The one verifier: which drafted tokens are accepted, and the token after them.

There are three rules.

- `greedy` accepts a token if it is the target's likeliest.
- `lossless` keeps the target's distribution exactly. Where tokens were *chosen*, one token is drawn
  from the target at every node, and the tree is followed as long as the draws agree with it
  (SpecExec, arXiv:2406.02532). One number decides at all nodes of a depth, so the answer is the one
  without drafting. Where tokens were *drawn*, siblings are tried in order, accepted with
  probability min(1, target / draft) and else replaced by the residual (Leviathan et al. 2023,
  Algorithm 1; for siblings drawn without replacement, Sequoia, arXiv:2402.12374).
- `typical` is Medusa's threshold (arXiv:2401.10774, 2.3.1). It changes the distribution, and
  reports say so.

Work is split in two so that a step has one host sync: `draw` enqueues on the device whatever needs
numbers, `walk` follows the tree with what was downloaded.
"""

from collections.abc import Callable, Sequence

import torch

from offload_rt.config import AcceptRule, SamplingConfig
from offload_rt.costs.sizes import DRAW_ROWS
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import Dice, likeliest, next_tokens, sample, target_probs
from offload_rt.speculative.base import Draft, Verdict

TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3  # Medusa's posterior_threshold and posterior_alpha


def draw(
    draft: Draft,
    logits: torch.Tensor,
    sampling: SamplingConfig,
    rule: AcceptRule,
    dice: Dice,
) -> torch.Tensor:
    """Enqueue everything random or numeric about a verification.

    Args:
        draft: what was proposed, N nodes.
        logits: [N + 1, V] of the target; row 0 is after the root, row i + 1 after node i.
        sampling: how the target's tokens are drawn.
        rule: when a drafted token is accepted.
        dice: source of randomness, on the device of `logits`; whoever keeps what is decided goes on
            by that many places (`Dice.advance`).

    Returns:
        int64 on the device, for `walk`.
    """
    if rule is AcceptRule.TYPICAL and not sampling.greedy:
        return _draw_typical(draft.tree, logits, sampling)
    if draft.probs is None or sampling.greedy:
        if sampling.greedy:
            return torch.cat([likeliest(part) for part in logits.split(DRAW_ROWS)])
        return _draw_tokens(draft.tree, logits, sampling, dice)
    return _draw_residual(draft.tree, draft.probs, logits, sampling, dice.generator)


def walk(draft: Draft, drawn: Sequence[int], sampling: SamplingConfig, rule: AcceptRule) -> Verdict:
    """Follow the tree with the numbers `draw` made."""
    tree, nodes = draft.tree, len(draft.tree)
    if rule is AcceptRule.TYPICAL and not sampling.greedy:
        best, tokens = drawn[0], drawn[1:]
        return Verdict(tree.path(best), tokens[best + 1])
    if draft.probs is None or sampling.greedy:
        return _follow(tree, lambda node, row: tree.tokens[node] == drawn[row], drawn)
    return _follow(tree, lambda node, row: bool(drawn[node]), drawn[nodes:])


def _follow(tree: TokenTree, keeps: Callable[[int, int], bool], tokens: Sequence[int]) -> Verdict:
    """Go down as long as a child is accepted; `tokens[row]` ends the path at that row."""
    children, at, path = tree.children(), ROOT, []
    while (child := next((c for c in children.get(at, ()) if keeps(c, at + 1)), None)) is not None:
        path.append(child)
        at = child
    return Verdict(tuple(path), tokens[at + 1])


def _draw_tokens(
    tree: TokenTree, logits: torch.Tensor, sampling: SamplingConfig, dice: Dice
) -> torch.Tensor:
    """[N + 1] a token of the target after each row; rows of a depth share their number."""
    numbers = dice.ahead(max(tree.depths, default=0) + 1)
    if not tree.is_chain:
        numbers = torch.stack([numbers[depth] for depth in (0, *tree.depths)])
    parts = zip(logits.split(DRAW_ROWS), numbers.split(DRAW_ROWS), strict=True)
    return torch.cat([next_tokens(part, sampling, uniform) for part, uniform in parts])


def _draw_residual(
    tree: TokenTree,
    draft_probs: torch.Tensor,
    logits: torch.Tensor,
    sampling: SamplingConfig,
    generator: torch.Generator,
) -> torch.Tensor:
    """[N] whether each node is accepted if its parent is, then [N + 1] the token ending there."""
    nodes, children = len(tree), tree.children()
    coins = torch.rand(nodes, generator=generator, device=logits.device)
    accepted = [coins.new_zeros(())] * nodes
    ends = []
    for row in range(nodes + 1):
        target = target_probs(logits[row : row + 1], sampling)[0]
        for node in children.get(row - 1, ()):
            draft, token = draft_probs[node], tree.tokens[node]
            accepted[node] = coins[node] * draft[token] < target[token]
            residual = (target - draft).clamp(min=0.0)
            mass = residual.sum()
            # No mass is left only where target = draft, and then the node is always accepted.
            target = torch.where(mass > 0, residual / mass.clamp(min=1e-30), target)
        ends.append(sample(target[None], generator))
    return torch.cat([torch.stack(accepted).to(torch.int64), *ends]) if nodes else torch.cat(ends)


def _draw_typical(tree: TokenTree, logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """The best accepted node, then [N + 1] the likeliest token after each row.

    A node is accepted if its probability exceeds min(epsilon, delta * exp(-entropy)) at its parent
    and so do all its ancestors; the deepest wins, of equally deep ones the likeliest path.
    """
    after = likeliest(logits)
    scores = [torch.zeros((), device=logits.device)]  # per row: log-likelihood of its path
    ranks = scores[:]
    for node, parent in enumerate(tree.parents):
        probs = target_probs(logits[parent + 1 : parent + 2], sampling)[0]
        entropy = -(probs * (probs + 1e-5).log()).sum()
        threshold = torch.clamp(TYPICAL_DELTA * torch.exp(-entropy), max=TYPICAL_EPSILON)
        prob = probs[tree.tokens[node]]
        path = scores[parent + 1] + prob.clamp(min=1e-30).log()
        scores.append(torch.where(prob > threshold, path, float("-inf")))
        # An accepted token adds more than -69, so depth decides first and likelihood then.
        ranks.append(scores[-1] + 100.0 * tree.depths[node])
    best = torch.stack(ranks).argmax(dim=0, keepdim=True)
    return torch.cat([best - 1, after])
