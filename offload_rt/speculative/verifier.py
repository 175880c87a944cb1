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

from array import array
from collections.abc import Callable, Sequence

import torch

from offload_rt.config import AcceptRule, SamplingConfig
from offload_rt.costs.sizes import drawn_rows
from offload_rt.device.base import Device
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import Dice, likeliest, next_tokens, pick, target_probs
from offload_rt.speculative.base import Draft, Verdict

TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3  # Medusa's posterior_threshold and posterior_alpha


def draw(
    draft: Draft,
    logits: torch.Tensor,
    sampling: SamplingConfig,
    rule: AcceptRule,
    dice: Dice,
    device: Device,
) -> torch.Tensor:
    """Enqueue everything random or numeric about a verification.

    Rows are worked on together, in parts of `drawn_rows`, so that the number of kernels does not
    grow with the draft.

    Args:
        draft: what was proposed, N nodes.
        logits: [N + 1, V] of the target; row 0 is after the root, row i + 1 after node i.
        sampling: how the target's tokens are drawn.
        rule: when a drafted token is accepted.
        dice: source of randomness, on the device of `logits`; whoever keeps what is decided goes on
            by that many places (`Dice.advance`).
        device: that of `logits`.

    Returns:
        int64 on the device, for `walk`.
    """
    if sampling.greedy:
        return likeliest(logits)
    if rule is AcceptRule.TYPICAL:
        return _draw_typical(draft.tree, logits, sampling, device)
    if draft.probs is None:
        return _draw_tokens(draft.tree, logits, sampling, dice, device)
    return _draw_residual(draft.tree, draft.probs, logits, sampling, dice.generator, device)


def walk(draft: Draft, drawn: Sequence[int], sampling: SamplingConfig, rule: AcceptRule) -> Verdict:
    """Follow the tree with the numbers `draw` made."""
    tree, nodes = draft.tree, len(draft.tree)
    if rule is AcceptRule.TYPICAL and not sampling.greedy:
        best = _best_typical(tree, drawn[:nodes])
        return Verdict(tree.path(best), drawn[nodes + best + 1])
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
    tree: TokenTree,
    logits: torch.Tensor,
    sampling: SamplingConfig,
    dice: Dice,
    device: Device,
) -> torch.Tensor:
    """[N + 1] a token of the target after each row; rows of a depth share their number."""
    numbers = dice.ahead(max(tree.depths, default=0) + 1)
    if not tree.is_chain:
        numbers = numbers[device.upload([0, *tree.depths])]
    rows, tokens = drawn_rows(device.kind, *logits.shape), _ids(len(logits), device)
    parts = zip(*(whole.split(rows) for whole in (tokens, logits, numbers)), strict=True)
    for drawn, part, uniform in parts:
        drawn.copy_(next_tokens(part, sampling, uniform))
    return tokens


def _draw_residual(
    tree: TokenTree,
    draft_probs: torch.Tensor,
    logits: torch.Tensor,
    sampling: SamplingConfig,
    generator: torch.Generator,
    device: Device,
) -> torch.Tensor:
    """[N] whether each node is accepted if its parent is, then [N + 1] the token ending there.

    First children of all rows are tried at once, then second ones, and so on: kernels are as many
    as for one node times the children of the largest family.
    """
    nodes, children = len(tree), tree.children()
    coins = torch.rand(nodes, generator=generator, device=logits.device)
    # One number a row, as for rows that are drawn one by one (`sample`).
    last = torch.rand(nodes + 1, dtype=torch.float64, generator=generator, device=logits.device)
    rows, tried = drawn_rows(device.kind, *logits.shape), list[int]()
    stands, ends = _ids(nodes, device), _ids(nodes + 1, device)
    for start in range(0, nodes + 1, rows):
        target = target_probs(logits[start : start + rows], sampling)
        families = [children.get(start + row - 1, ()) for row in range(len(target))]
        for rank in range(max(map(len, families))):
            at = [row for row, family in enumerate(families) if rank < len(family)]
            chosen = [families[row][rank] for row in at]
            tokens = device.upload([tree.tokens[node] for node in chosen])[:, None]
            left, draft = _take(target, at, device), _take(draft_probs, chosen, device)
            ratios = _take(coins, chosen, device) * draft.gather(1, tokens)[:, 0]
            stands[len(tried) : len(tried) + len(at)] = ratios < left.gather(1, tokens)[:, 0]
            residual = (left - draft).clamp_(min=0.0)
            mass = residual.sum(dim=-1, keepdim=True)
            # No mass is left only where target = draft, and then the node is always accepted.
            left = torch.where(mass > 0, residual.div_(mass.clamp(min=1e-30)), left)
            target = _put(target, at, left, device)
            tried += chosen
        ends[start : start + rows] = pick(target, last[start : start + rows])
    if tried != list(range(nodes)):
        stands = stands[device.upload(_places(tried))]
    return torch.cat([stands, ends])


def _draw_typical(
    tree: TokenTree, logits: torch.Tensor, sampling: SamplingConfig, device: Device
) -> torch.Tensor:
    """[N] bits of log-likelihoods, as `_by_parent` has nodes, then [N + 1] the likeliest tokens.

    A node's is that of its token after its parent; -inf where that does not exceed min(epsilon,
    delta * exp(-entropy)).
    """
    after, children = likeliest(logits), tree.children()
    rows, parents = drawn_rows(device.kind, *logits.shape), sorted(children)
    scores = []
    for start in range(0, len(parents), rows):
        part = parents[start : start + rows]
        probs = target_probs(_take(logits, [node + 1 for node in part], device), sampling)
        entropy = -(probs * (probs + 1e-5).log()).sum(dim=-1)
        threshold = torch.clamp(TYPICAL_DELTA * torch.exp(-entropy), max=TYPICAL_EPSILON)
        row_of = device.upload([row for row, node in enumerate(part) for _ in children[node]])
        tokens = [tree.tokens[child] for node in part for child in children[node]]
        prob = probs[row_of, device.upload(tokens)]
        logs = prob.clamp(min=1e-30).log().double()
        scores.append(logs.masked_fill_(prob <= threshold[row_of], float("-inf")))
    return torch.cat([*(part.view(torch.int64) for part in scores), after])


def _best_typical(tree: TokenTree, bits: Sequence[int]) -> int:
    """The deepest node that is accepted with all its ancestors; of several the likeliest path."""
    own = dict(zip(_by_parent(tree), memoryview(array("q", bits)).cast("B").cast("d"), strict=True))
    best, paths = (0, 0.0, -ROOT), {ROOT: 0.0}
    for node, parent in enumerate(tree.parents):
        paths[node] = paths[parent] + own[node]
        if paths[node] > float("-inf"):
            best = max(best, (tree.depths[node], paths[node], -node))
    return -best[2]


def _by_parent(tree: TokenTree) -> list[int]:
    """Nodes in the order of their parents."""
    return sorted(range(len(tree)), key=tree.parents.__getitem__)


def _ids(count: int, device: Device) -> torch.Tensor:
    """[count] to be filled part by part.

    Made first: what each part leaves behind would lie between the holes of its large temporaries,
    and malloc would find no room for the next ones there (docs/RESULTS.md, "Holes of drawing").
    """
    return torch.empty(count, dtype=torch.int64, device=device.torch_device)


def _take(values: torch.Tensor, rows: Sequence[int], device: Device) -> torch.Tensor:
    """These rows; a view where they follow one another."""
    if _follow_each_other(rows):
        return values[rows[0] : rows[-1] + 1]
    return values[device.upload(rows)]


def _put(
    values: torch.Tensor, rows: Sequence[int], new: torch.Tensor, device: Device
) -> torch.Tensor:
    """The same with these rows replaced; `values` is used up."""
    if _follow_each_other(rows):
        values[rows[0] : rows[-1] + 1] = new
        return values
    return values.index_copy_(0, device.upload(rows), new)


def _follow_each_other(rows: Sequence[int]) -> bool:
    return list(rows) == list(range(rows[0], rows[0] + len(rows)))


def _places(order: Sequence[int]) -> list[int]:
    """Where each of 0, 1, ... is in an order of them."""
    places = [0] * len(order)
    for place, node in enumerate(order):
        places[node] = place
    return places
