"""Medusa's trees: upstream's named ones, what is built from them, and best-first nested ones."""

import itertools
import json
import math

import pytest
import torch
from engines import what_rows_see
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.medusa.calibration import (
    CALIBRATION_FILE,
    Calibration,
    best_trees,
    read_calibration,
    tree_for,
    write_calibration,
)
from offload_rt.speculative.medusa.drafter import fill
from offload_rt.speculative.medusa.judge import Judge
from offload_rt.speculative.medusa.trees import (
    DEFAULT_TREE,
    MedusaTree,
    cut,
    named_trees,
)

# Nodes at each depth and leaves, counted for upstream's file at e2a5d20.
COUNTED = {
    "mc_sim_7b_63": ([10, 28, 23, 2], 42),
    "vicuna_7b_stage2": ([10, 23, 23, 7], 42),
    "vicuna_7b_stage1_ablation": ([10, 21, 25, 7], 42),
    "vicuna_7b_stage1": ([10, 32, 20, 1], 44),
    "vicuna_13b_stage2": ([10, 19, 25, 9], 42),
    "vicuna_13b_stage1": ([10, 29, 23, 1], 44),
    "vicuna_33b_stage2": ([10, 24, 24, 5], 43),
    "vicuna_33b_stage1": ([10, 34, 19], 46),
    "zephyr_stage2": ([10, 27, 23, 3], 44),
}


def slow_buffers(choices):
    """Mask, depths and paths, straight from what they mean."""
    nodes = [(), *sorted(choices, key=lambda c: (len(c), c))]
    size = len(nodes)
    mask = [[nodes[i][: len(nodes[j])] == nodes[j] for j in range(size)] for i in range(size)]
    leaves = [c for c in nodes if not any(o[: len(c)] == c and o != c for o in nodes)]
    width = 1 + max(map(len, nodes))
    paths = [
        [nodes.index(leaf[:d]) if d <= len(leaf) else -1 for d in range(width)] for leaf in leaves
    ]
    return mask, [len(c) for c in nodes], paths


def token_tree(tree):
    return TokenTree(tuple(range(len(tree))), tree.parents)


@pytest.mark.parametrize("name", COUNTED)
def test_named_trees_make_the_buffers_they_should(name):
    choices = named_trees()[name]
    tree = MedusaTree(choices)
    mask, depths, paths = slow_buffers(choices)
    assert what_rows_see(token_tree(tree).row_parents()).tolist() == mask
    assert [0, *token_tree(tree).depths] == depths
    assert sorted(tree.paths()) == sorted(paths)
    by_depth, leaves = COUNTED[name]
    assert [depths.count(d + 1) for d in range(len(by_depth))] == by_depth
    assert len(tree.paths()) == leaves
    assert len(tree) == 63 and tree.heads == len(by_depth) and tree.ranks == 10


def test_the_named_trees_are_upstreams_nine():
    assert set(named_trees()) == set(COUNTED)
    for choices in named_trees().values():
        assert all(not c[:-1] or c[:-1] in choices[:i] for i, c in enumerate(choices))


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_a_cut_tree_is_the_beginning_of_the_next_larger_one(name, heads):
    before = set()
    for nodes in range(1, 66):
        now = set(cut(named_trees()[name], nodes=nodes, heads=heads).choices)
        assert before <= now and len(now) <= nodes
        assert all(len(c) <= heads and (not c[:-1] or c[:-1] in now) for c in now)
        before = now
    assert len(before) == sum(COUNTED[name][0][:heads])


def test_an_empty_tree_is_a_tree():
    tree = MedusaTree(())
    assert (len(tree), tree.heads, tree.ranks, tree.paths()) == (0, 0, 0, [[0]])


@given(depth=st.integers(0, 5))
def test_a_filled_tree_has_each_heads_token_of_each_rank(depth):
    tree = MedusaTree(named_trees()[DEFAULT_TREE])
    tokens = [[100 * head + rank for rank in range(10)] for head in range(1, 5)]
    filled = fill(tree, tokens, depth)
    assert len(filled) == sum(len(c) <= depth for c in tree.choices)
    for node in range(len(filled)):
        path = [filled.tokens[n] for n in filled.path(node)]
        assert path == [100 * (i + 1) + rank for i, rank in enumerate(tree.choices[node])]


def test_ranks_a_small_vocabulary_lacks_are_left_out_with_what_follows():
    tree = MedusaTree(((0,), (2,), (0, 0), (2, 0)))
    assert fill(tree, [[5, 6], [7, 8]], 9) == TokenTree((5, 7), (-1, 0))


# --- best first ----------------------------------------------------------------------------------

accuracies = st.lists(
    st.lists(st.floats(0.0, 0.33), min_size=1, max_size=3), min_size=1, max_size=3
)


def every_node(accuracy):
    """All nodes there are, with what they are worth."""
    for depth in range(1, len(accuracy) + 1):
        for choice in itertools.product(*(range(len(row)) for row in accuracy[:depth])):
            yield choice, math.prod(accuracy[i][rank] for i, rank in enumerate(choice))


@settings(deadline=None)
@given(accuracy=accuracies)
def test_best_first_trees_are_best_for_every_number_of_nodes(accuracy):
    worth = dict(every_node(accuracy))
    ranked = sorted(worth.values(), reverse=True)
    useful = sum(value > 0 for value in ranked)
    trees = best_trees(accuracy, 100)
    assert len(trees.choices) == useful
    for nodes in range(1, useful + 1):
        chosen = trees.choices[:nodes]
        assert best_trees(accuracy, nodes).choices == chosen  # nested
        assert all(not c[:-1] or c[:-1] in chosen for c in chosen)
        total = math.fsum(worth[c] for c in chosen)
        assert total == pytest.approx(math.fsum(ranked[:nodes]), rel=1e-12, abs=1e-300)
        assert trees.tokens_per_pass(nodes) == pytest.approx(1 + total)
        assert len(trees.tree(nodes)) == nodes


def test_released_accuracies_saturate_as_published():
    """Vicuna-7B's five heads by their published top-1 and top-5; an infinite tree gives 2.48."""
    top = [(0.56, 0.78), (0.32, 0.56), (0.20, 0.42), (0.15, 0.34), (0.12, 0.30)]
    accuracy = [[first, *[(five - first) / 4] * 4] for first, five in top]
    every = best_trees(accuracy, 10**6)
    assert len(every.choices) == sum(5**depth for depth in range(1, 6)) == 3905
    assert every.tokens_per_pass(10**6) == pytest.approx(2.48, abs=0.02)
    assert 0.94 < every.tokens_per_pass(63) / every.tokens_per_pass(10**6) < 0.98


# --- calibration ---------------------------------------------------------------------------------

COUNTS = Calibration(model="m", dtype="float32", places=(10, 8), hits=((4, 0, 3), (1, 2, 0)))


def test_a_calibration_is_what_was_written(tmp_path):
    write_calibration(COUNTS, tmp_path)
    assert read_calibration(tmp_path) == COUNTS
    assert COUNTS.accuracy == [[0.4, 0.0, 0.3], [0.125, 0.25, 0.0]]
    assert [p.name for p in tmp_path.iterdir()] == [CALIBRATION_FILE]
    # (0,) .4, (2,) .3, (0, 1) .1, (2, 1) .075, (0, 0) .05; rank 1 of head 1 is never right.
    best = tree_for(tmp_path, heads=2, nodes=5)
    assert best.choices == ((0,), (2,), (0, 0), (0, 1), (2, 1))


def test_without_a_calibration_a_named_tree_is_cut(tmp_path):
    tree = tree_for(tmp_path, heads=2, nodes=7)
    first = [c for c in named_trees()[DEFAULT_TREE] if len(c) <= 2][:7]
    assert set(tree.choices) == set(first)
    assert read_calibration(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, known is 1"),
        ({"places": [10]}, "do not fit"),
        ({"hits": [[4, 0, 7], [1, 2, 0]]}, "do not fit"),
        ({"hits": [[4, -1, 3], [1, 2, 0]]}, "do not fit"),
        ({"hits": [[4.5], [1]]}, "do not fit"),
        ({"hits": [[], []]}, "do not fit"),
        ({"places": []}, "do not fit"),
        ({"hits": "many"}, "do not fit"),
    ],
)
def test_calibrations_that_are_none_are_refused(tmp_path, changes, message):
    write_calibration(COUNTS, tmp_path)
    path = tmp_path / CALIBRATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        read_calibration(tmp_path)


def test_a_calibration_of_other_heads_is_refused(tmp_path):
    write_calibration(COUNTS, tmp_path)
    with pytest.raises(CheckpointError, match="is of 2 heads, there are 5: remove it"):
        tree_for(tmp_path, heads=5, nodes=8)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot write .* is no folder: make it first"):
        write_calibration(COUNTS, tmp_path / "missing")


@settings(deadline=None, max_examples=40)
@given(data=st.data(), heads=st.integers(1, 4), ranks=st.integers(1, 5), extra=st.integers(0, 3))
def test_hits_are_counted_where_head_and_rank_meet_the_text(data, heads, ranks, extra):
    """Head k, at the state that made token i, is about token i + 1 + k."""
    text = data.draw(st.lists(st.integers(0, 5), max_size=25))
    places = len(text) + extra
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    guesses = torch.stack(
        [
            torch.stack([torch.randperm(6, generator=generator)[:ranks] for _ in range(heads)])
            for _ in range(max(places, 1))
        ]
    )
    judge = Judge(lambda hidden, count: guesses[hidden[:, 0].long(), :, :count], heads, ranks)
    judge.add([torch.tensor([float(i)]) for i in range(places)], text)
    counted = judge.result("m", "float32")
    for k in range(heads):
        judged = [(i, text[i + 1 + k]) for i in range(len(text)) if i + 1 + k < len(text)]
        assert counted.places[k] == len(judged)
        for rank in range(ranks):
            assert counted.hits[k][rank] == sum(int(guesses[i, k, rank]) == t for i, t in judged)
