"""Expected tokens per pass: enumerated, simulated, and by Sequoia's own recursion."""

import itertools
import math
import random
import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.costs.acceptance import (
    chain_tokens,
    grow_tree,
    rate_of_share,
    triforce_tokens,
)
from offload_rt.errors import ConfigError

RATE = st.floats(0, 1)
RATES = st.lists(RATE, min_size=1, max_size=5)


def at(rates, depth):
    return rates[min(depth, len(rates) - 1)]


def enumerated_chain(rates, gamma):
    """The mean over all 2^gamma ways tokens can stand or fall."""
    mean = 0.0
    for stands in itertools.product([False, True], repeat=gamma):
        chance = math.prod(at(rates, d) if ok else 1 - at(rates, d) for d, ok in enumerate(stands))
        accepted = next((d for d, ok in enumerate(stands) if not ok), gamma)
        mean += chance * (accepted + 1)
    return mean


@given(rates=RATES, gamma=st.integers(0, 9))
def test_a_chain_yields_the_mean_over_all_outcomes(rates, gamma):
    assert chain_tokens(rates, gamma) == pytest.approx(enumerated_chain(rates, gamma))


@given(rates=RATES, gamma=st.integers(0, 60), more=RATES)
def test_a_chain_yields_more_with_better_rates_and_with_more_tokens(rates, gamma, more):
    tokens = chain_tokens(rates, gamma)
    assert 1.0 <= tokens <= gamma + 1 + 1e-9
    assert chain_tokens(rates, gamma + 1) >= tokens - 1e-9
    better = [max(rate, at(more, d)) for d, rate in enumerate(rates)]
    assert chain_tokens(better, gamma) >= tokens - 1e-9


def test_one_rate_is_leviathans_formula():
    assert chain_tokens([0.8], 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert chain_tokens([1.0], 7) == 8 and chain_tokens([0.0], 7) == 1


@given(rate=RATE, gamma=st.integers(1, 40))
def test_a_share_of_accepted_tokens_gives_the_rate_back(rate, gamma):
    share = (chain_tokens([rate], gamma) - 1) / gamma
    assert chain_tokens([rate_of_share(share, gamma)], gamma) == pytest.approx(
        chain_tokens([rate], gamma), abs=1e-6
    )


def test_published_shares_have_the_published_rates():
    # reference numbers of TriForce's authors: 0.7407 accepted at gamma 6, 0.712 at gamma 16
    assert rate_of_share(0.7407, 6) == pytest.approx(0.915, abs=5e-4)
    assert rate_of_share(0.712, 16) == pytest.approx(0.959, abs=5e-4)


def shares(size):
    """A row of rates of siblings: disjoint events."""
    return st.lists(st.floats(0, 1), min_size=size, max_size=size).map(
        lambda row: [x / max(1.0, sum(row)) for x in row]
    )


def all_trees(depths, ranks, nodes):
    """Every tree of at most `nodes` nodes, as a set of paths."""
    found, frontier = {frozenset()}, {frozenset()}
    for _ in range(nodes):
        grown = set()
        for tree in frontier:
            for parent in [(), *tree]:
                if len(parent) < depths:
                    grown |= {tree | {(*parent, rank)} for rank in range(ranks)}
        frontier = grown
        found |= grown
    return found


@given(accuracy=st.lists(shares(3), min_size=1, max_size=3), nodes=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_no_tree_of_that_size_is_better(accuracy, nodes):
    def tokens(tree):
        return 1 + sum(math.prod(accuracy[d][rank] for d, rank in enumerate(path)) for path in tree)

    best = max(map(tokens, all_trees(len(accuracy), 3, nodes)))
    assert grow_tree(accuracy, nodes).tokens(nodes) == pytest.approx(best)
    grown = grow_tree(accuracy, nodes)
    assert tokens(grown.choices) == pytest.approx(best)
    assert all(
        path[:-1] == () or path[:-1] in grown.choices[:i] for i, path in enumerate(grown.choices)
    )


def sequoia(rates, nodes, depth):
    """Best F of a tree of `nodes` non-root nodes, by the recursion of arXiv:2402.12374."""

    @cache
    def best(size, children, levels):  # `size` counts the root of the subtree
        if size == 1:
            return 1.0
        if children == 0 or levels == 0:
            return -math.inf
        return max(
            best(size - m, children - 1, levels) + rates[children - 1] * any_of(m, levels - 1)
            for m in range(1, size)
        )

    @cache
    def any_of(size, levels):
        return max(best(size, children, levels) for children in range(len(rates) + 1))

    return max(any_of(size, depth) for size in range(1, nodes + 2))


@given(row=shares(4), nodes=st.integers(0, 12), depth=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_trees_are_those_of_sequoias_dynamic_programme(row, nodes, depth):
    rates = sorted(row, reverse=True)
    expected = pytest.approx(sequoia(rates, nodes, depth))
    assert grow_tree([rates], nodes, depth).tokens(nodes) == expected


@given(accuracy=st.lists(shares(3), min_size=1, max_size=4), nodes=st.integers(1, 64))
@settings(deadline=None)
def test_trees_are_nested_and_grow_ever_more_slowly(accuracy, nodes):
    grown = grow_tree(accuracy, nodes)
    assert list(grown.values) == sorted(grown.values, reverse=True)
    smaller = grow_tree(accuracy, nodes - 1)
    assert grown.choices[: len(smaller.choices)] == smaller.choices
    assert grown.depth(nodes) <= len(accuracy)
    chain = [max(row) for row in accuracy]
    assert grown.tokens(nodes) >= chain_tokens(chain, min(nodes, len(chain))) - 1e-9


def drawn_step(rng, outer, gamma, inner, inner_gamma):
    """One step as `TriForceDrafter` makes it, every token drawn."""
    drafted = passes = steps = 0
    while drafted < gamma:
        width = min(inner_gamma, gamma - drafted - 1)
        stood = 0
        while stood < width and rng.random() < at(inner, stood):
            stood += 1
        drafted, passes, steps = drafted + stood + 1, passes + 1, steps + width
    accepted = 0
    while accepted < gamma and rng.random() < at(outer, accepted):
        accepted += 1
    return accepted + 1, passes, steps


@pytest.mark.parametrize(
    ("outer", "gamma", "inner", "inner_gamma"),
    [([0.95], 16, [0.21], 1), ([0.9, 0.7], 5, [0.6, 0.3], 3), ([0.5], 1, [0.9], 4)],
)
def test_two_levels_agree_with_drawn_steps(outer, gamma, inner, inner_gamma):
    rng, rounds = random.Random(7), 20_000
    drawn = [drawn_step(rng, outer, gamma, inner, inner_gamma) for _ in range(rounds)]
    mean = [sum(column) / rounds for column in zip(*drawn, strict=True)]
    made = triforce_tokens(outer, gamma, inner, inner_gamma)
    assert [made.tokens, made.retrieval_passes, made.draft_steps] == pytest.approx(mean, rel=0.02)


@given(inner=RATES, gamma=st.integers(1, 24), inner_gamma=st.integers(0, 6))
def test_better_inner_drafts_never_need_more_passes(inner, gamma, inner_gamma):
    made = triforce_tokens([0.9], gamma, inner, inner_gamma)
    assert gamma / (inner_gamma + 1) - 1e-9 <= made.retrieval_passes <= gamma + 1e-9
    assert made.draft_steps <= inner_gamma * made.retrieval_passes + 1e-9
    without = triforce_tokens([0.9], gamma, inner, 0)
    assert without.retrieval_passes == pytest.approx(gamma) and without.draft_steps == 0


def test_large_trees_are_quick():
    start = time.process_time()
    assert grow_tree([[0.6, 0.2, 0.1, 0.05]], 1024, 48).tokens(1024) > 5
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: chain_tokens([1.5], 2), "acceptance rate of 1.5"),
        (lambda: chain_tokens([math.nan], 2), "acceptance rate of nan"),
        (lambda: chain_tokens([], 2), "no acceptance rate"),
        (lambda: chain_tokens([0.5], -1), "-1 tokens"),
        (lambda: rate_of_share(0.5, 0), "share of 0"),
        (lambda: grow_tree([[0.9, 0.3]], 4), "0.9, 0.3 .* more than 1"),
        (lambda: triforce_tokens([0.5], 3, [], 1), "no acceptance rate"),
        (lambda: triforce_tokens([0.5], 3, [0.2], -1), "-1 tokens"),
    ],
)
def test_impossible_rates_are_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        call()
