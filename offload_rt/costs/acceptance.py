"""How many tokens a pass is expected to emit, from how often drafted tokens are accepted.

All of it rests on *positional independence* (Sequoia, arXiv:2402.12374, section 3): whether a node
is accepted depends on its depth and its rank among its siblings only, once all its ancestors are.
A pass over the target emits the accepted nodes and one token more: the bonus token, or the one that
replaces the first rejected one. Siblings exclude each other, as one token can be right.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from offload_rt.errors import ConfigError

Rates = Sequence[float]
Path = tuple[int, ...]

_BISECTIONS = 60  # halvings of [0, 1]: beyond the precision of a float


def chain_tokens(rates: Rates, gamma: int) -> float:
    """Expected tokens of a pass that checks a chain of `gamma` drafted tokens, the last included.

    1 + sum over d = 1..gamma of r_1 * ... * r_d; with one rate it is Leviathan et al.'s
    (1 - r^(gamma + 1)) / (1 - r) (arXiv:2211.17192, eq. 1).

    Args:
        rates: share of tokens accepted at each depth if those before are; the last goes on.
        gamma: drafted tokens.

    Raises:
        ConfigError: a rate is outside 0 to 1, there is none, or gamma is negative.
    """
    rates = _checked(rates)
    if gamma < 0:
        raise ConfigError(f"a draft of {gamma} tokens is asked for: give 0 or more")
    reached, tokens = 1.0, 1.0
    for depth in range(min(gamma, len(rates))):
        reached *= rates[depth]
        tokens += reached
    return tokens + _geometric(reached, rates[-1], gamma - len(rates))


def rate_of_share(share: float, gamma: int) -> float:
    """The one rate with which a chain of `gamma` has `share` of its tokens accepted.

    Systems publish accepted over drafted tokens; this solves sum over d of a^d = gamma * share for
    a, as TriForce's authors do (their `fake2real`).

    Raises:
        ConfigError: the share is outside 0 to 1, or gamma below 1.
    """
    _checked([share])
    if gamma < 1:
        raise ConfigError(f"a share of {gamma} drafted tokens says nothing: give 1 or more")
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if chain_tokens([middle], gamma) - 1.0 < share * gamma:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class GrownTree:
    """The best trees of every size, each the beginning of the next.

    Attributes:
        choices: nodes, the most valuable first; each is the ranks on its path, (1, 0) the first
            child of the root's second.
        values: what each adds to the expected tokens of a pass.
    """

    choices: tuple[Path, ...]
    values: tuple[float, ...]

    def tokens(self, nodes: int) -> float:
        """Expected tokens of a pass that checks the first `nodes` nodes, the last included."""
        return 1.0 + math.fsum(self.values[:nodes])

    def depth(self, nodes: int) -> int:
        """Passes a draft model makes for the first `nodes` nodes: the depth of the deepest."""
        return max(map(len, self.choices[:nodes]), default=0)


def grow_tree(accuracy: Sequence[Rates], nodes: int, depth: int | None = None) -> GrownTree:
    """Grow the best tree of up to `nodes` nodes; all smaller ones are its beginnings.

    A node adds the product of the rates on its path (Sequoia's F; Medusa, arXiv:2401.10774, 2.3.3).
    A child never adds more than its parent nor, in the order of their rates, than a sibling before
    it: so the best node there is, taken again and again, gives the optimum that Sequoia's dynamic
    programme finds, for all sizes at once. A node never accepted is left out, so there may be
    fewer.

    Args:
        accuracy: [depths][ranks] how often the child of that rank is accepted if its parent is.
        nodes: at most, the root not counted.
        depth: at most; beyond the last row that row goes on. None: as many as there are rows.

    Raises:
        ConfigError: a rate is outside 0 to 1, or those of a row add up to more than 1.
    """
    # Chance can make a later rank more accurate than an earlier one: siblings go by accuracy.
    rows = [sorted(((a, r) for r, a in enumerate(_row(row))), key=_best_first) for row in accuracy]
    deepest = len(rows) if depth is None else depth if rows else 0
    choices: list[Path] = []
    values: list[float] = []
    heap: list[tuple[float, int, Path, int, float]] = []

    def offer(parent: Path, place: int, parent_value: float) -> None:
        row = rows[min(len(parent), len(rows) - 1)] if len(parent) < deepest else []
        if place < len(row) and (value := parent_value * row[place][0]) > 0.0:
            path = (*parent, row[place][1])
            heapq.heappush(heap, (-value, len(path), path, place, parent_value))

    offer((), 0, 1.0)
    while heap and len(choices) < nodes:
        negative, _, path, place, parent_value = heapq.heappop(heap)
        choices.append(path)
        values.append(-negative)
        offer(path[:-1], place + 1, parent_value)
        offer(path, 0, -negative)
    return GrownTree(tuple(choices), tuple(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class TriForceTokens:
    """What a pass over the full cache yields, and the work below it.

    Attributes:
        tokens: emitted per pass over the full cache.
        retrieval_passes: over the retrieval cache, per outer draft.
        draft_steps: tokens drafted for those, one after another.
    """

    tokens: float
    retrieval_passes: float
    draft_steps: float


def triforce_tokens(outer: Rates, gamma: int, inner: Rates, inner_gamma: int) -> TriForceTokens:
    """Expected tokens and work of one step of `speculative/triforce`.

    A pass over the retrieval cache checks k = min(inner_gamma, room - 1) tokens, `room` being what
    the outer draft still lacks; j of them stand, with probability s_j = r_1..r_j * (1 - r_{j+1})
    (s_k = r_1..r_k), and it yields j + 1 tokens. So the passes are P(room) = 1 + sum over j of
    s_j * P(room - j - 1), P(0) = 0: about gamma / chain_tokens(inner, inner_gamma) of them.

    Args:
        outer: share of the outer draft's tokens the full cache accepts, by depth.
        gamma: tokens of the outer draft.
        inner: share of an inner draft's tokens the retrieval cache accepts, by depth.
        inner_gamma: tokens of an inner draft; 0: the retrieval model drafts alone.

    Raises:
        ConfigError: a rate is outside 0 to 1, there is none, or a gamma is negative.
    """
    tokens = chain_tokens(outer, gamma)
    chain_tokens(inner, inner_gamma)  # checks them
    passes, steps = [0.0], [0.0]
    for room in range(1, gamma + 1):
        width = min(inner_gamma, room - 1)
        reached, passed, stepped = 1.0, 1.0, float(width)
        for accepted in range(width + 1):
            rate = inner[min(accepted, len(inner) - 1)] if accepted < width else 0.0
            passed += reached * (1.0 - rate) * passes[room - accepted - 1]
            stepped += reached * (1.0 - rate) * steps[room - accepted - 1]
            reached *= rate
        passes.append(passed)
        steps.append(stepped)
    return TriForceTokens(tokens=tokens, retrieval_passes=passes[-1], draft_steps=steps[-1])


def _geometric(first: float, rate: float, terms: int) -> float:
    """Sum of first * rate^d over d = 1..terms."""
    if terms <= 0:
        return 0.0
    if rate > 1.0 - 1e-9:
        return first * terms
    return first * rate * (1.0 - rate**terms) / (1.0 - rate)


def _best_first(rated: tuple[float, int]) -> tuple[float, int]:
    return -rated[0], rated[1]


def _row(rates: Rates) -> Rates:
    if math.fsum(_checked(rates, may_be_empty=True)) > 1.0 + 1e-6:
        raise ConfigError(
            f"the rates {', '.join(f'{r:g}' for r in rates)} of the children of one node add up to "
            "more than 1, but only one of them can stand: give shares of all drafts"
        )
    return rates


def _checked(rates: Rates, *, may_be_empty: bool = False) -> Rates:
    for rate in rates:
        if not 0.0 <= rate <= 1.0:  # NaN too
            raise ConfigError(f"an acceptance rate of {rate:g} cannot be: give one from 0 to 1")
    if not rates and not may_be_empty:
        raise ConfigError("no acceptance rate is given: give at least one, from 0 to 1")
    return rates
