"""Laws 3, 4 and 5 with drafters: the same text, the same distribution, the same caches."""

import json
import os
import random
import sys
from array import array
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache

import forks
import pytest
import torch
from engines import HOST, PROMPT, engine_for, generate, what_rows_see
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEEP

from offload_rt import sampling as sampling_module
from offload_rt.config import (
    AcceptRule,
    DraftConfig,
    DraftShape,
    DraftWeights,
    GenerationConfig,
    RetrievalConfig,
    SamplingConfig,
)
from offload_rt.device.kinds import CPU
from offload_rt.engine import Run
from offload_rt.errors import ConfigError
from offload_rt.kv.prefixes import common_prefix
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import Dice, make_generator, sample, target_probs
from offload_rt.speculative import deciding, together, verifier
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.ngram import drafter as ngram_module
from offload_rt.speculative.ngram.drafter import NgramDrafter, SelectiveNgramDrafter
from offload_rt.speculative.ngram.followers import RANKS, Followers, Likely, pack_likely
from offload_rt.speculative.together import Asked, propose_all
from offload_rt.speculative.triforce import drafter as triforce_drafter
from offload_rt.speculative.verifier import draw, walk

REPEATS = PROMPT * 3
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO = IDS | {"num_hidden_layers": 2}  # as many as differ: what a pass costs is its layers


@st.composite
def trees(draw_from, max_nodes=9, vocab=6):
    nodes = draw_from(st.integers(0, max_nodes))
    parents = [draw_from(st.integers(ROOT, node - 1)) for node in range(nodes)]
    tokens = [draw_from(st.integers(0, vocab - 1)) for _ in range(nodes)]
    return TokenTree(tuple(tokens), tuple(parents))


# --- trees ---------------------------------------------------------------------------------------


@given(tree=trees())
def test_a_node_sees_exactly_its_path(tree):
    seen = what_rows_see(tree.row_parents())
    assert seen[0].nonzero().flatten().tolist() == [0]
    for node in range(len(tree)):
        expected = [0, *(n + 1 for n in tree.path(node))]
        assert seen[node + 1].nonzero().flatten().tolist() == expected
        assert tree.depths[node] == len(expected) - 1
    assert tree.is_chain == (tree == TokenTree.chain(tree.tokens))


@given(tree=trees(max_nodes=40), newest=st.integers(1, 40), data=st.data())
def test_the_newest_rows_see_what_they_would_among_all(tree, newest, data):
    """Of rows some of which continue what is committed, as those of a tree that grows."""
    parents = [data.draw(st.sampled_from([ROOT, parent])) for parent in tree.row_parents()]
    rows = min(newest, len(parents))
    seen = what_rows_see(parents, rows)
    for row, sees in enumerate(seen.tolist(), len(parents) - rows):
        path, at = set(), row
        while at != ROOT:
            path.add(at)
            at = parents[at]
        assert {place for place, one in enumerate(sees) if one} == path


@pytest.mark.parametrize("parents", [(0,), (-2,), (-1, 1), (-1, -1, 5)])
def test_a_parent_must_come_before_its_child(parents):
    with pytest.raises(ConfigError, match="cannot continue"):
        TokenTree((1,) * len(parents), parents)


@settings(deadline=None, max_examples=25)
@given(tree=trees(max_nodes=7, vocab=250))
def test_checking_a_tree_equals_checking_each_path(tiny_engines, tree):
    for engine in tiny_engines:
        engine.truncate(0, 0)
        engine.forward([(0, PROMPT)], reuse=False)
        together = engine.check([(0, 77, tree)])[0]
        for leaf in {*range(len(tree))} - {*tree.parents}:  # its path is that of all before it
            engine._caches[0].truncate(len(PROMPT))
            path = tree.path(leaf)
            alone = engine.check([(0, 77, TokenTree.chain([tree.tokens[n] for n in path]))])[0]
            assert torch.allclose(together[[0, *(n + 1 for n in path)]], alone, atol=2e-4)
        engine._caches[0].truncate(len(PROMPT))


@settings(deadline=None, max_examples=25)
@given(tree=trees(max_nodes=7, vocab=250), data=st.data())
def test_after_keeping_any_path_a_cache_equals_a_fresh_prefill(tiny_engines, tree, data):
    """Law 5: the logits after the kept path are those of a prompt that ends in it."""
    node = data.draw(st.integers(ROOT, len(tree) - 1))
    for engine in tiny_engines:
        engine.truncate(0, 0)
        engine.forward([(0, PROMPT)], reuse=False)
        engine.check([(0, 77, tree)])
        path = tree.path(node)
        tokens = [77, *(tree.tokens[n] for n in path)]
        engine.commit(0, tokens, [0, *(n + 1 for n in path)])
        after = engine.forward([(0, [123])], reuse=False)
        engine.truncate(0, 0)
        fresh = engine.forward([(0, [*PROMPT, *tokens, 123])], reuse=False)
        assert torch.allclose(after, fresh, atol=2e-4)


@pytest.fixture(scope="module")
def tiny_engines(make_tiny):
    """A full-attention and a sliding-window model, streamed."""
    window = {"head_dim": 16, "sliding_window": 6}
    window["layer_types"] = ["sliding_attention", "full_attention"]
    options = {"tokens": 40, "resident_layers": 0, "slots": 1}
    with (
        engine_for(make_tiny("llama", **TWO), **options) as llama,
        engine_for(make_tiny("gemma2", **TWO, **window), **options) as gemma,
    ):
        yield [llama, gemma]


# --- the verifier --------------------------------------------------------------------------------

VOCAB = 5


@contextmanager
def rows_come_again():
    """What the few rows of a world come to is computed once, not for each of `SEEDS`."""
    known = {}

    def look_up(logits, config):
        asked = config, logits.numpy().tobytes()
        if asked not in known:
            known[asked] = target_probs(logits, config)
        return known[asked].clone()

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():  # as in a run
        for place in (verifier, sampling_module, triforce_drafter):
            patch.setattr(place, "target_probs", look_up)
        yield


@rows_come_again()
def emitted_first_two(drafts, target_logits, sampling, rule):
    """Counts of the first two emitted tokens, when the target's rows are decided by token ids."""
    counts, after = torch.zeros(VOCAB, VOCAB), target_probs(target_logits, sampling)
    generator = make_generator(1, "cpu")
    for draft in drafts:
        logits = target_logits[[VOCAB, *draft.tree.tokens]]
        verdict = walk(
            draft,
            draw(draft, logits, sampling, rule, Dice(generator), HOST).tolist(),
            sampling,
            rule,
        )
        tokens = [draft.tree.tokens[n] for n in verdict.path] + [verdict.token]
        if len(tokens) < 2:  # the next pass starts after the first token
            tokens.append(int(torch.multinomial(after[tokens[-1]], 1, generator=generator)))
        counts[tokens[0], tokens[1]] += 1
    return counts


def chi_square(counts, expected):
    """Survival probability of the statistic, by Wilson and Hilferty's approximation."""
    mask = expected > 0
    assert counts[~mask].sum() == 0
    statistic = float(((counts - expected)[mask] ** 2 / expected[mask]).sum())
    freedom = int(mask.sum()) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return 0.5 * torch.erfc(torch.tensor(z / 2**0.5)).item()


@pytest.fixture(scope="module")
def world():
    """Target and draft logits after each token, and after the root (last row)."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(VOCAB + 1, VOCAB, generator=generator) * 1.2
    draft = target + torch.randn(VOCAB + 1, VOCAB, generator=generator)
    return target, draft


def sampled_chain(draft_logits, sampling, count):
    """So many drafts, each token drawn after the one before."""
    after, generator = target_probs(draft_logits, sampling), make_generator(2, "cpu")

    @cache
    def draft(*tokens):
        return Draft(TokenTree.chain(tokens), after[[VOCAB, tokens[0]]])

    first = torch.multinomial(after[VOCAB], count, replacement=True, generator=generator)
    second = torch.multinomial(after[first], 1, generator=generator)
    return [draft(*tokens) for tokens in torch.cat([first[:, None], second], 1).tolist()]


def sampled_tree(draft_logits, sampling, count):
    """Two siblings drawn without replacement, each with two children drawn likewise."""
    after, generator = target_probs(draft_logits, sampling), make_generator(2, "cpu")

    @cache
    def siblings(row, first):
        left = after[row].clone()
        left[first] = 0.0
        return [after[row], left / left.sum()]

    @cache
    def draft(*tokens):
        families = zip((VOCAB, *tokens[:2]), tokens[::2], strict=True)
        probs = [row for family in families for row in siblings(*family)]
        return Draft(TokenTree(tokens, (ROOT, ROOT, 0, 0, 1, 1)), torch.stack(probs))

    two = torch.multinomial(after[VOCAB].expand(count, -1), 2, generator=generator)
    four = torch.multinomial(after[two.flatten()], 2, generator=generator).view(count, 4)
    return [draft(*tokens) for tokens in torch.cat([two, four], 1).tolist()]


def chosen_tree(draft_logits, sampling, count):
    return [Draft(TokenTree((0, 1, 2, 3, 0, 2), (ROOT, ROOT, 0, 0, 1, 1)))] * count


KINDS = {"chain": sampled_chain, "tree": sampled_tree, "chosen": chosen_tree}
SAMPLINGS = [
    SamplingConfig(temperature=1.0, seed=0),
    SamplingConfig(temperature=0.7, top_k=4, seed=0),
    SamplingConfig(temperature=1.3, top_p=0.85, min_p=0.05, seed=0),
]
SEEDS, FEWER = 2000, 1000  # a rule that is wrong shows in fewer


def expected_counts(target, sampling, count=SEEDS):
    first = target_probs(target[VOCAB][None], sampling)[0]
    second = target_probs(target[:VOCAB], sampling)
    return first[:, None] * second * count


# Each kind of draft, each way to narrow what may be drawn, and what is drawn plain as well; so is
# what was chosen, in blocks, below.
PLAIN, TOP_K, TOP_P = SAMPLINGS
JOINT = {"chain": [PLAIN, TOP_P], "tree": [PLAIN, TOP_K], "chosen": [TOP_P]}


@pytest.mark.parametrize(
    ("kind", "sampling"), [(kind, one) for kind, some in JOINT.items() for one in some]
)
def test_lossless_keeps_the_joint_distribution_of_the_first_tokens(world, kind, sampling):
    target, draft = world
    drafts = KINDS[kind](draft, sampling, SEEDS)
    counts = emitted_first_two(drafts, target, sampling, AcceptRule.LOSSLESS)
    assert chi_square(counts, expected_counts(target, sampling)) > 1e-4


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_wrong_draft_probabilities_fail_the_same_test(world, kind):
    """The negative control: a drafter that lies about what it drew from."""
    target, draft = world
    sampling = SAMPLINGS[0]
    honest = KINDS[kind](draft, sampling, FEWER)
    told = [Draft(one.tree, torch.full_like(one.probs, 1 / VOCAB)) for one in honest]
    counts = emitted_first_two(told, target, sampling, AcceptRule.LOSSLESS)
    assert chi_square(counts, expected_counts(target, sampling, FEWER)) < 1e-6


def test_sampling_the_target_instead_of_the_residual_fails_the_same_test(world, monkeypatch):
    """The published TriForce's rule at its first level (reference: triforce.md 1.4)."""
    target, draft = world
    sampling = SAMPLINGS[0]
    monkeypatch.setattr(torch.Tensor, "clamp", lambda self, min=0.0, max=None: self)
    monkeypatch.setattr(torch, "where", lambda mask, one, other: other)
    drafts = sampled_chain(draft, sampling, FEWER)
    counts = emitted_first_two(drafts, target, sampling, AcceptRule.LOSSLESS)
    assert chi_square(counts, expected_counts(target, sampling, FEWER)) < 1e-6


@settings(deadline=None)
@given(tree=trees(vocab=VOCAB), seed=st.integers(0, 10**6))
def test_greedy_follows_the_targets_likeliest_tokens(tree, seed):
    logits = torch.randn(len(tree) + 1, VOCAB, generator=torch.Generator().manual_seed(seed))
    sampling, draft = SamplingConfig(), Draft(tree)
    for rule in AcceptRule:
        drawn = draw(draft, logits, sampling, rule, Dice(make_generator(0, "cpu")), HOST).tolist()
        verdict = walk(draft, drawn, sampling, rule)
        at = ROOT
        for node in verdict.path:
            assert tree.parents[node] == at
            assert tree.tokens[node] == int(logits[at + 1].argmax())
            at = node
        assert verdict.token == int(logits[at + 1].argmax())
        assert not any(
            parent == at and tree.tokens[node] == verdict.token
            for node, parent in enumerate(tree.parents)
        )


@settings(deadline=None)
@given(tree=trees(vocab=VOCAB), seed=st.integers(0, 10**6), temperature=st.floats(0.3, 2.0))
def test_typical_equals_its_formula(tree, seed, temperature):
    logits = torch.randn(len(tree) + 1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    sampling = SamplingConfig(temperature=temperature, seed=0)
    draft = Draft(tree)
    drawn = draw(
        draft, logits, sampling, AcceptRule.TYPICAL, Dice(make_generator(0, "cpu")), HOST
    ).tolist()
    verdict = walk(draft, drawn, sampling, AcceptRule.TYPICAL)
    best = (0, 0.0, ())
    for node in range(len(tree)):
        path, score, stands = tree.path(node), 0.0, True
        for step in path:
            p = torch.softmax(logits[tree.parents[step] + 1].double() / temperature, 0)
            entropy = -(p * (p + 1e-5).log()).sum()
            stands &= bool(p[tree.tokens[step]] > min(0.09, 0.3 * torch.exp(-entropy)))
            score += float(p[tree.tokens[step]].log())
        if stands and (len(path), score) > (
            best[0],
            best[1] + 1e-4 if best[0] == len(path) else -1e9,
        ):
            best = (len(path), score, path)
    assert len(verdict.path) == best[0]
    end = verdict.path[-1] if verdict.path else ROOT
    assert verdict.token == int(logits[end + 1].argmax())


def one_by_one(draft, logits, sampling, generator):
    """Leviathan's rule written out, node by node; Sequoia's for siblings."""
    tree, children = draft.tree, draft.tree.children()
    coins = torch.rand(len(tree), generator=generator)
    accepted, ends = {}, []
    for row in range(len(tree) + 1):
        target = target_probs(logits[row : row + 1], sampling)[0]
        for node in children.get(row - 1, ()):
            probs, token = draft.probs[node], tree.tokens[node]
            accepted[node] = bool(coins[node] * probs[token] < target[token])
            residual = (target - probs).clamp(min=0.0)
            target = residual / residual.sum() if residual.sum() > 0 else target
        ends.append(int(sample(target[None], generator)))
    at, path = ROOT, []
    while (child := next((c for c in children.get(at, ()) if accepted[c]), None)) is not None:
        path.append(at := child)
    return Verdict(tuple(path), ends[at + 1])


@settings(deadline=None, max_examples=60)
@given(
    tree=trees(max_nodes=24, vocab=VOCAB),
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 30),
    sampling=st.sampled_from(SAMPLINGS),
    close=st.floats(0.0, 2.0),
)
def test_nodes_tried_together_are_decided_as_one_by_one(tree, seed, rows, sampling, close):
    """Residuals of many rows at once, in parts of any size, siblings in turn: the same answer."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(tree) + 1, VOCAB, generator=generator) * 2
    near = logits[[parent + 1 for parent in tree.parents]]
    near = near + close * torch.randn(near.shape, generator=generator)
    draft = Draft(tree, target_probs(near, sampling))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "drawn_rows", lambda *_: rows)
        dice = Dice(make_generator(seed, "cpu"))
        drawn = draw(draft, logits, sampling, AcceptRule.LOSSLESS, dice, HOST).tolist()
    verdict = walk(draft, drawn, sampling, AcceptRule.LOSSLESS)
    assert verdict == one_by_one(draft, logits, sampling, make_generator(seed, "cpu"))


def test_rows_are_drawn_in_blocks_without_changing_the_law(world, monkeypatch):
    monkeypatch.setattr(verifier, "drawn_rows", lambda *_: 2)
    target, draft = world
    drafts = chosen_tree(draft, SAMPLINGS[0], SEEDS)
    counts = emitted_first_two(drafts, target, SAMPLINGS[0], AcceptRule.LOSSLESS)
    assert chi_square(counts, expected_counts(target, SAMPLINGS[0])) > 1e-4


# --- n-grams -------------------------------------------------------------------------------------


def test_ngram_proposes_what_followed_before():
    drafter = NgramDrafter(6, 99)
    ids = [1, 2, 3, 4, 5, 9, 9, 1, 2, 3]
    assert drafter.propose(ids, 3).tree == TokenTree.chain([4, 5, 9])
    assert drafter.propose([*ids, 7], 3).tree == TokenTree()
    branching = [1, 2, 8, 1, 2, 9, 9, 1, 2]
    assert NgramDrafter(4, 99).propose(branching, 2).tree == TokenTree((9, 9, 8, 1), (-1, 0, -1, 2))


LEARNED = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=3),
        st.permutations(range(4)),
        st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    learned=LEARNED,
    depth=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    explores=st.booleans(),
)
def test_an_ngram_tree_begins_as_a_smaller_one_and_has_no_path_twice(
    ids, learned, depth, sizes, explores
):
    drafter = NgramDrafter(20, 99, explores=explores)
    for context, tokens, probs in learned:
        shares = sorted((p / max(1e-9, sum(probs)) for p in probs), reverse=True)
        drafter.learn(context, TokenTree(), Likely([tokens], [shares]))
    small, large = (drafter.propose(ids, depth, size).tree for size in sorted(sizes))
    assert small.tokens == large.tokens[: len(small)]
    assert small.parents == large.parents[: len(small)]
    assert len(small) == min(min(sizes), len(large)) and max(large.depths, default=0) <= depth
    paths = {tuple(large.tokens[n] for n in large.path(node)) for node in range(len(large))}
    assert len(paths) == len(large)


def test_many_nodes_of_ngrams_are_drafted_in_few_calls():
    numbers = random.Random(3)
    ids = [numbers.randrange(50) for _ in range(1000)]
    drafter = NgramDrafter(1024, 4096)
    for _ in range(8):
        tree = drafter.propose(ids, 64).tree
        rows = range(len(tree) + 1)
        shares = [sorted((numbers.random() ** 4 for _ in range(8)), reverse=True) for _ in rows]
        probs = [[share / sum(row) for share in row] for row in shares]
        drafter.learn(ids, tree, Likely([numbers.sample(range(50), 8) for _ in rows], probs))
    calls = []
    sys.setprofile(lambda _frame, event, _: calls.append(event) if "call" in event else None)
    try:
        tree = drafter.propose(ids, 64).tree
    finally:
        sys.setprofile(None)
    assert len(tree) > 600
    assert len(calls) < 40 * len(tree)  # 35; 65 where all that may follow a node is written out
    first = drafter.propose(ids, 64, 100).tree
    assert (first.tokens, first.parents) == (tree.tokens[:100], tree.parents[:100])


def test_what_was_likely_after_the_same_tokens_is_drafted():
    drafter, tree = NgramDrafter(8, 99), TokenTree((5, 6), (ROOT, ROOT))
    drafter.learn(
        [1, 2], tree, Likely([[5, 6], [7, 8], [8, 7]], [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
    )
    expected = TokenTree((5, 7, 8, 6, 8, 7), (ROOT, 0, 0, ROOT, 3, 3))
    assert drafter.propose([3, 1, 2], 2).tree == expected  # by two tokens
    assert drafter.propose([3, 4, 2], 1).tree == TokenTree((5, 6), (ROOT, ROOT))  # by the last
    drafter.learn([4, 2], TokenTree(), Likely([[9]], [[1.0]]))
    assert drafter.propose([3, 4, 2], 1).tree == TokenTree((9,), (ROOT,))
    assert drafter.propose([3, 1, 2], 2).tree == expected  # still what followed these two
    drafter.forget()
    assert drafter.propose([3, 1, 2], 2).tree == TokenTree()


def test_nodes_left_over_find_out_what_follows_tokens_that_were_likely():
    drafter, likely = NgramDrafter(4, 99, explores=True), Likely([[5, 6, 7]], [[0.6, 0.3, 0.1]])
    drafter.learn([1, 2], TokenTree(), likely)
    tree = drafter.propose([1, 9], 4).tree
    assert tree == TokenTree((5, 6, 7), (ROOT, ROOT, ROOT))
    drafter.learn([1, 9], tree, Likely([[8], [3], [4], [2]], [[1.0]] * 4))
    # 8 and what followed 7, 6 and 5 are new; 2 is known.
    assert drafter.propose([30, 31], 4).tree == TokenTree((4, 3, 8), (ROOT, ROOT, ROOT))
    assert drafter.propose([1, 6], 2).tree.tokens[0] == 4
    assert NgramDrafter(4, 99).propose([1, 9], 4).tree == TokenTree()


def test_the_text_and_what_was_likely_are_one_tree():
    drafter = NgramDrafter(3, 99)
    ids = [1, 2, 3, 9, 1, 2, 3]
    drafter.learn(ids, TokenTree(), Likely([[8, 9]], [[0.6, 0.4]]))
    assert drafter.propose(ids, 1).tree == TokenTree((8, 9), (ROOT, ROOT))  # 0.48 and 0.45
    drafter.learn(ids, TokenTree(), Likely([[8, 9]], [[0.5, 0.5]]))
    assert drafter.propose(ids, 1).tree == TokenTree((9, 8), (ROOT, ROOT))


def test_the_longer_a_quote_the_surer_it_is():
    """Twelve equal tokens say more than four, so a long quote is drafted deep."""
    text = list(range(100, 140))
    deep = NgramDrafter(16, 99).propose([*text, *text[:12]], 30).tree
    assert deep == TokenTree.chain(text[12:28])


def test_followers_keep_the_latest_contexts():
    kept = Followers(most=4)
    for token in range(6):
        kept.learn([10 + token, token], [token + 1], [1.0])
    assert kept.after([14, 4]) == (2, array("q", [5]), array("f", [1.0]))
    assert kept.after([0, 4])[0] == 1 and kept.after([0, 3]) == (0, (), ())
    kept.learn([14, 4], [6], [0.5])  # again: it is the latest now
    kept.learn([16, 6], [7], [1.0])
    assert list(kept.after([14, 4])[1]) == [6] and kept.after([15, 5])[0] == 0


@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 30),
    seed=st.integers(0, 99),
    warm=st.floats(0.5, 3),
)
def test_likely_tokens_come_with_the_verdict(rows, vocab, seed, warm):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * warm
    likely = Likely.read(pack_likely(logits).tolist(), [0] * rows)
    best = logits.topk(min(RANKS, vocab))
    assert likely.tokens == best.indices.tolist()
    torch.testing.assert_close(
        torch.tensor(likely.probs), best.values.softmax(-1), atol=2e-6, rtol=0
    )


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_the_index_does_not_depend_on_how_the_sequence_grew(ids, cut):
    grown = NgramDrafter(8, 99)
    grown.propose(ids[:cut] or [5], 4)
    assert grown.propose(ids, 4) == NgramDrafter(8, 99).propose(ids, 4)


@given(
    ids=st.lists(st.integers(0, 2), max_size=30),
    others=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=4),
    cut=st.integers(0, 30),
)
def test_the_index_goes_back_as_if_it_had_never_read_further(ids, others, cut):
    """Below triforce the sequence goes on in drafts that are then dropped."""
    grown, fresh = NgramDrafter(8, 99), NgramDrafter(8, 99)
    for other in others:
        read = [*ids[:cut], *other]
        grown.propose(read, 4)
        assert common_prefix(read, ids) == len(os.path.commonprefix([read, ids]))
    assert grown.propose([*ids, 1], 4) == fresh.propose([*ids, 1], 4)
    assert grown._index._ends == fresh._index._ends


# --- whole runs ----------------------------------------------------------------------------------


def offered(drafter, ids, tokens):
    """Have a text come token by token, or as drafts stand; returns what stood of each offer."""
    ids, stood = list(ids), []
    while tokens:
        draft = drafter.propose(ids, 6)
        node, path = -1, []
        for token in tokens[:-1]:
            children = (n for n, p in enumerate(draft.tree.parents) if p == node)
            node = next((n for n in children if draft.tree.tokens[n] == token), None)
            if node is None:
                break
            path.append(node)
        if len(draft.tree):
            stood.append(len(path))
        drafter.observe(draft, Verdict(tuple(path), 0))
        count = min(len(path) + 1, len(tokens))
        ids, tokens = ids + tokens[:count], tokens[count:]
    return stood


def test_ngrams_that_do_not_stand_are_kept_back_until_they_would():
    """A token that was seen before is followed by another each time; then the text quotes."""
    wrong = [t for n in range(30) for t in (1, 100 + n)]
    ever, drafter = NgramDrafter(6, 99), SelectiveNgramDrafter(NgramDrafter(6, 99), 0.6)
    assert len(offered(ever, wrong[:6], wrong[6:])) == 27
    made = offered(drafter, wrong[:6], wrong[6:])
    assert 3 < len(made) < 12 and sum(made) == 0
    text = list(range(200, 260))
    drafter.propose([*wrong, *text], 6)
    assert sum(offered(drafter, [*wrong, *text], text)) > 30  # it begins to quote
    drafter.forget()
    assert len(offered(drafter, wrong[:6], wrong[6:])) == len(made)  # as if it were new


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.lists(st.integers(0, 3), min_size=2, max_size=30),
    answer=st.lists(st.integers(0, 3), min_size=2, max_size=40),
)
def test_what_is_kept_back_is_judged_as_if_it_had_been_offered(prompt, answer):
    """The last offers may not be decided when the text ends."""
    kept = SelectiveNgramDrafter(NgramDrafter(6, 99), 0.6)
    kept._accepted, kept._worthwhile, judged = 0.0, 1e9, []
    kept._note = judged.append
    offered(kept, prompt, answer)
    real = offered(NgramDrafter(6, 99), prompt, answer)
    assert judged[: len(real) - 1] == real[: len(judged)][: len(real) - 1]
    assert len(real) - 1 <= len(judged) <= len(real)


def test_which_ngrams_are_kept_back_changes_no_answer(make_tiny, monkeypatch):
    folder = make_tiny("llama", **TWO)
    with engine_for(folder, prompts=[REPEATS], tokens=20) as engine:
        plain = generate(engine, [REPEATS], tokens=20)
    monkeypatch.setattr(ngram_module, "_MEMORY", 1)
    drafted = []
    for worthwhile in (0.0, 0.6, 9.0):
        kind = replace(CPU, worthwhile=worthwhile)
        monkeypatch.setattr("offload_rt.device.cpu.CpuDevice.kind", kind)
        draft = DraftConfig(draft="triforce", draft_tokens=6, retrieval=LITTLE)
        with engine_for(folder, prompts=[REPEATS], tokens=20, draft=draft) as engine:
            run = start(engine, 20, prompt=REPEATS)
            drafted.append(run.report().speculation.retrieval.drafted)
            assert [s.emitted for s in run.sequences] == plain
    assert drafted[0] >= drafted[1] >= drafted[2] and drafted[0] > drafted[2]


@pytest.fixture(scope="module")
def drafts(make_tiny):
    small = str(make_tiny("llama", num_hidden_layers=1, hidden_size=32, **IDS))
    same = str(make_tiny("llama", **TWO))
    return {
        "ngram": DraftConfig(draft="ngram", draft_tokens=6),
        "chain": DraftConfig(draft=f"model:{small}", draft_tokens=3),
        "tree": DraftConfig(draft=f"model:{small}", draft_tokens=12),
        "windowed-chain": DraftConfig(draft=f"model:{small}", draft_tokens=3, draft_window=21),
        "windowed-tree": DraftConfig(draft=f"model:{small}", draft_tokens=12, draft_window=30),
        "oracle-chain": DraftConfig(draft=f"model:{same}", draft_tokens=4),
        "oracle-tree": DraftConfig(draft=f"model:{same}", draft_tokens=6, shape=DraftShape.TREE),
        "triforce": DraftConfig(draft="triforce", draft_tokens=5, retrieval=LITTLE),
        "triforce-model": DraftConfig(
            draft=f"triforce:{small}", draft_tokens=5, inner_tokens=2, retrieval=LITTLE
        ),
        "triforce-tree": DraftConfig(
            draft=f"triforce:{same}", draft_tokens=7, inner_tokens=12, retrieval=LITTLE
        ),
        "triforce-copies": DraftConfig(
            draft=f"triforce:{small}",
            draft_tokens=5,
            inner_tokens=2,
            retrieval=replace(LITTLE, retrieval_weights=DraftWeights.INT8),
        ),
        "self-chain": DraftConfig(draft="self:int4", draft_tokens=3),
        "self-tree": DraftConfig(draft="self:int4", draft_tokens=12),
    }


LITTLE = RetrievalConfig(budget_tokens=20, chunk_tokens=3, recent_share=0.4, rebuild_tokens=6)
SELF = ["self-chain", "self-tree"]  # they draft where layers are streamed and rows are there
STREAMED = {name: {"resident_layers": 0, "slots": 1} for name in SELF}
# All on the device, or nothing of it; of what drafts likewise, each of the two; one of the two for
# a chain, a tree and what drafts over KV.
BOTH = ("ngram", "chain", "tree", "triforce", "triforce-model")
PLACES = [(name, *place) for name in BOTH for place in ((None, "device"), (0, "disk"))]
PLACES += [(name, None, "device") for name in ("windowed-tree", "oracle-chain")]
PLACES += [
    (name, 0, "disk")
    for name in ("windowed-chain", "oracle-tree", "triforce-tree", "triforce-copies")
]
MIXED = ((0, "device"), (None, "disk"))
PLACES += [(name, *place) for name in ("chain", "tree", "triforce") for place in MIXED]
PLACES += [(name, resident, "device") for name in SELF for resident in (0, 1)]


THREE, WRITTEN = [REPEATS, PROMPT[:4], PROMPT[::-1] * 2], 12


@pytest.fixture(scope="module")
def plain(make_tiny):
    """Answers to three prompts without drafts."""
    with engine_for(make_tiny("llama", **TWO), prompts=THREE, tokens=WRITTEN) as engine:
        return generate(engine, THREE, tokens=WRITTEN)


@pytest.fixture(scope="module")
def alone(make_tiny):
    """The answer to one prompt without drafts."""
    with engine_for(make_tiny("llama", **TWO), tokens=24) as engine:
        return generate(engine, tokens=24)[0]


@pytest.mark.parametrize(("name", "resident", "kv"), PLACES)
def test_greedy_with_a_drafter_equals_greedy_without(make_tiny, drafts, plain, name, resident, kv):
    folder = make_tiny("llama", **TWO)
    options = {"resident_layers": resident, "slots": None if resident is None else 1}
    options |= {"kv": kv, "kv_block_tokens": 16 if kv == "disk" else None}
    at_once = kv == "device" and resident is None or name in SELF  # others have two, for time
    prompts = THREE if at_once else THREE[:2]
    options |= {"prompts": prompts, "tokens": WRITTEN}
    with engine_for(folder, draft=drafts[name], **options) as engine:
        for tokens in (1, WRITTEN):
            run_tokens = generate(engine, prompts, tokens=tokens)
            assert run_tokens == [answer[:tokens] for answer in plain[: len(prompts)]]
        if at_once:
            ends_inside_a_draft(engine, plain[0])


def ends_inside_a_draft(engine, answer):
    """An end token among those that were drafted ends the answer exactly there."""
    # Drafts of 4 that are all right end at 5 and at 10: those places are no inner ones.
    place = next(i for i in (8, 7, 9, 4, 3) if answer.index(answer[i]) == i)
    end = answer[place]
    options, ends = GenerationConfig(max_tokens=WRITTEN), frozenset([end])
    run = Run.start(engine, [REPEATS], SamplingConfig(), options, ends)
    run.prefill()
    while run.active:
        run.step()
    assert run.sequences[0].emitted == answer[: answer.index(end) + 1]
    assert run.sequences[0].finish_reason == "stop"


def test_a_drafter_that_is_the_target_is_always_right(make_tiny, drafts):
    folder = make_tiny("llama", **TWO)
    with engine_for(folder, tokens=21, draft=drafts["oracle-chain"]) as engine:
        run = start(engine, 21)
        report = run.report().speculation
        assert report.acceptance_rate == 1.0
        assert report.passes == 1 + 4  # the prompt's, then 5 tokens each
        assert report.drafted == report.accepted == 16
        assert report.acceptance_per_depth == [1.0] * 4


def start(engine, tokens, sampling=None, prompt=PROMPT):
    options = GenerationConfig(max_tokens=tokens)
    run = Run.start(engine, [prompt], sampling or SamplingConfig(), options)
    run.prefill()
    while run.active:
        run.step()
    return run


def test_a_sampled_run_with_a_drafter_is_repeatable(make_tiny, drafts):
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, seed=11)
    names = ("chain", "tree", "ngram", "windowed-chain", "triforce", "triforce-model", *SELF)
    for name in names:
        options = {"draft": drafts[name]} | STREAMED.get(name, {})
        with engine_for(make_tiny("llama", **TWO), tokens=8, **options) as engine:
            answers = [start(engine, 8, sampling).sequences[0].emitted for _ in range(2)]
        assert answers[0] == answers[1]


def test_a_seeded_answer_is_the_models_whoever_drafts(make_tiny):
    """Where draft tokens are chosen, one number decides at each place: seed and model are all."""
    folder, answers = make_tiny("llama", **TWO), {}
    sampling = SamplingConfig(temperature=0.7, top_k=2, seed=11)
    asked = [(name, tokens) for name in ("ngram", f"model:{folder}") for tokens in (12, 9)]
    drafting = [DraftConfig(draft=name, draft_tokens=tokens) for name, tokens in asked]
    for draft in (DraftConfig(), *drafting):
        with engine_for(folder, prompts=[REPEATS], tokens=24, draft=draft) as engine:
            runs = [start(engine, 24, sampling, REPEATS) for _ in range(2)]
            answers[draft] = runs[0].sequences[0].emitted
            assert runs[1].sequences[0].emitted == answers[draft]  # whatever the first one taught
            assert runs[0].counts.accepted > 0 or draft.kind == "none"
    assert len(set(map(tuple, answers.values()))) == 1


def test_what_one_answer_taught_does_not_change_the_next(make_tiny):
    """Which share of recent tokens is tried depends on what was accepted; a seed repeats all."""
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, seed=11)
    retrieval = RetrievalConfig(budget_tokens=12, chunk_tokens=3, rebuild_tokens=3)
    draft = DraftConfig(draft="triforce", draft_tokens=4, retrieval=retrieval)
    folder, answers, newest = make_tiny("llama", **TWO), [], []
    with engine_for(folder, prompts=[REPEATS], tokens=28, draft=draft) as engine:
        for _ in range(2):
            run = start(engine, 28, sampling, REPEATS)
            answers.append(run.sequences[0].emitted)
            newest.append((run.sequences[0].retrieval.builds, run.sequences[0].retrieval.passes))
            assert 0 < run.sequences[0].retrieval.newest_builds < newest[-1][0]
    assert answers[0] == answers[1] and newest[0] == newest[1]


@pytest.mark.parametrize("name", ["chain", "triforce-model", *SELF])
def test_a_drafter_that_fails_is_left_out_and_decoding_goes_on(
    make_tiny, drafts, alone, caplog, name
):
    folder = make_tiny("llama", **TWO)
    place = STREAMED.get(name, {})
    with engine_for(folder, tokens=24, draft=drafts[name], **place) as engine:
        (engine._draft_model or engine._rounded_copy).network.forward = lambda batch: 1 / 0
        assert generate(engine, tokens=24) == [alone]
    told = [r.getMessage() for r in caplog.records if "goes on without it" in r.getMessage()]
    assert len(told) == 1


@pytest.mark.parametrize("name", ["chain", "tree", "self-tree"])
@pytest.mark.eager
def test_drafts_of_several_are_made_in_the_same_passes(make_tiny, drafts, monkeypatch, name):
    """Each is what its drafter makes alone, and one that fails hurts no other."""
    prompts = [PROMPT, PROMPT[::-1], PROMPT[3:]]
    place = STREAMED.get(name, {})
    folder, passes = make_tiny("llama", **TWO), []
    with engine_for(folder, prompts=prompts, tokens=30, draft=drafts[name], **place) as engine:
        run = Run.start(engine, prompts, SamplingConfig(), GenerationConfig(max_tokens=30))
        run.prefill()
        model = engine._draft_model or engine._rounded_copy
        honest = model.logits
        monkeypatch.setattr(model, "logits", lambda rows: passes.append(len(rows)) or honest(rows))
        asked = [Asked(s.drafter, s.ids, 20, engine.draft.nodes) for s in run.sequences]

        def made(some):
            passes.clear()
            for one in asked:
                one.drafter.forget()
                one.drafter.begin(SamplingConfig(), make_generator(1, "cpu"))
            return propose_all(some), len(passes)

        alone, counts = zip(*(made([one]) for one in asked), strict=True)
        drafts_of_all, count = made(asked)
        assert [draft.tree for draft in drafts_of_all] == [draft.tree for (draft,) in alone]
        assert all(len(draft.tree) > 2 for draft in drafts_of_all)
        assert passes[0] == 3 and count == max(counts) < sum(counts)
        monkeypatch.setattr(together, "SHARED_ROWS", 2)
        assert [d.tree for d in made(asked)[0]] == [d.tree for d in drafts_of_all]
        assert len(passes) > count
        monkeypatch.setattr(together, "SHARED_ROWS", 64)
        asked[1] = replace(asked[1], ids=[*asked[1].ids[:-1], 300])
        first, unknown, last = made(asked)[0]
        assert isinstance(unknown, ConfigError) and "token 300 has no row" in str(unknown)
        assert [first.tree, last.tree] == [drafts_of_all[0].tree, drafts_of_all[2].tree]
        asked[1] = replace(asked[1], ids=run.sequences[1].ids)
        if not drafts[name].as_tree:
            return
        monkeypatch.setattr(asked[1].drafter._grower, "_children", lambda logits: 1 / 0)
        first, broken, last = made(asked)[0]
        assert isinstance(broken, ZeroDivisionError)
        assert [first.tree, last.tree] == [drafts_of_all[0].tree, drafts_of_all[2].tree]


@pytest.mark.parametrize("accept", [AcceptRule.LOSSLESS, AcceptRule.TYPICAL])
@pytest.mark.parametrize("shape", [DraftShape.CHAIN, DraftShape.TREE])
@pytest.mark.eager
def test_what_a_sampled_answer_rests_on_is_drafted_alone(make_tiny, shape, accept):
    """Rows of others in a pass may change its last bits: then answers would go by who is there."""
    folder = make_tiny("llama", **TWO)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=6, shape=shape, accept=accept)
    with engine_for(folder, tokens=8, draft=draft) as engine:
        for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0, seed=3)):
            drafter = engine.drafter(0, sampling, make_generator(3, "cpu"))
            shared = drafter.shared_model(6) is not None
            assert shared is (sampling.greedy or not draft.answers_rest_on_it)


def test_a_draft_model_with_another_vocabulary_is_refused_with_both_sizes(make_tiny):
    other = make_tiny("llama", vocab_size=900, **IDS)
    draft = DraftConfig(draft=f"model:{other}")
    with (
        pytest.raises(ConfigError, match="has 900 tokens.* the target 300"),
        engine_for(make_tiny("llama", **TWO), draft=draft),
    ):
        pass


@pytest.mark.parametrize("ids", [260, 340])
@pytest.mark.parametrize("shape", [DraftShape.CHAIN, DraftShape.TREE])
def test_a_vocabulary_padded_otherwise_changes_nothing(make_tiny, alone, ids, shape):
    """A draft model may know fewer or more ids; those only one side has are never drafted."""
    folder = make_tiny("llama", **TWO)
    other = make_tiny("llama", vocab_size=ids, num_hidden_layers=1, **IDS)
    draft = DraftConfig(draft=f"model:{other}", draft_tokens=6, shape=shape)
    sampling = SamplingConfig(temperature=1.5, seed=3)
    with engine_for(folder, tokens=16, draft=draft) as engine:
        assert generate(engine, tokens=16) == [alone[:16]]
        assert len(start(engine, 16, sampling).sequences[0].emitted) == 16


@pytest.mark.eager
def test_memory_with_a_draft_model_stays_within_the_plan(make_tiny):
    config = {"hidden_size": 256, "intermediate_size": 1024, "dtype": "bfloat16", **DEEP, **IDS}
    folder = make_tiny("llama", **config)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=16)
    with engine_for(folder, tokens=20, draft=draft, resident_layers=1, slots=2) as engine:
        generate(engine, tokens=20)
        memory = engine.memory()
        assert engine.placement.demand.drafter_bytes > 4 * 2**20
        assert memory.device_peak_bytes <= memory.device_planned_bytes


@pytest.mark.parametrize(
    ("sequences", "nodes", "shape", "sampling"),
    [
        (1, 120, DraftShape.CHAIN, SamplingConfig(temperature=1.0, seed=3)),
        (3, 50, DraftShape.CHAIN, SamplingConfig(temperature=1.0, seed=3)),
        (1, 64, DraftShape.TREE, SamplingConfig(temperature=1.0, top_p=0.9, seed=3)),
        (1, 128, DraftShape.TREE, SamplingConfig()),
    ],
)
def test_probabilities_of_a_large_vocabulary_stay_within_the_plan(
    make_tiny, sequences, nodes, shape, sampling
):
    """In a process of its own: the heap of one that ran tests has holes of theirs."""
    folder = make_tiny("llama", vocab_size=60_000, num_hidden_layers=1, dtype="bfloat16")
    given = json.dumps([str(folder), sequences, nodes, shape, asdict(sampling)])
    done = forks.run([sys.executable, "-c", LARGE_VOCABULARY, given])
    peak_bytes, planned_bytes = map(int, done.stdout.split())
    assert 2**25 < peak_bytes <= planned_bytes, done.stderr


LARGE_VOCABULARY = """
import json, sys
from engines import PROMPT, engine_for
from offload_rt.config import DraftConfig, DraftShape, GenerationConfig, SamplingConfig
from offload_rt.engine.decoding import Run
folder, sequences, nodes, shape, sampling = json.loads(sys.argv[1])
draft = DraftConfig(draft=f"model:{folder}", draft_tokens=nodes, shape=DraftShape(shape))
prompts, tokens = [PROMPT] * sequences, nodes + 2
with engine_for(
    folder, prompts=prompts, tokens=tokens, draft=draft, device_limit_bytes=2**30
) as engine:
    options = GenerationConfig(max_tokens=tokens)
    run = Run.start(engine, prompts, SamplingConfig(**sampling), options)
    run.prefill()
    for _ in range(2):  # the second meets what the first left behind
        if run.active:
            run.step()
    memory = engine.memory()
print(memory.device_peak_bytes, memory.device_planned_bytes)
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "eagle"}, "--draft eagle is not known"),
        ({"draft": "model:"}, "not known"),
        ({"draft": "ngram", "draft_tokens": 0}, "--draft-tokens is 0"),
        ({"draft_tokens": 4}, "no effect with --draft none"),
        ({"draft": "ngram", "shape": DraftShape.TREE}, "for drafting with a MODEL"),
        ({"draft": "ngram", "draft_window": 64}, "--draft-window is for drafting with a MODEL"),
        ({"draft": "model:m", "draft_window": 80}, "full or 81 or more.* the 64 of a draft"),
        ({"draft": "model:m", "draft_tokens": 2, "draft_window": -1}, "-window is -1, .* 19 or"),
        ({"draft": "triforce:m", "draft_window": 20}, "-window is 20, .* 21 or"),
        ({"accept": AcceptRule.TYPICAL}, "no effect without --draft"),
        ({"draft": "triforce:"}, "not known"),
        ({"draft": "ngram:x"}, "not known"),
        ({"draft": "ngram", "inner_tokens": 4}, "--inner-gamma is for --draft triforce"),
        ({"draft": "triforce", "inner_tokens": 0}, "--inner-gamma is 0"),
        ({"draft": "triforce", "shape": DraftShape.TREE}, "for drafting with a MODEL"),
        ({"draft": "self:int3"}, "--draft self:int3 is not known: use .* self:int4|int8"),
        ({"draft": "self", "draft_window": 64}, "--draft-window is for drafting with a MODEL"),
        ({"draft": "self", "draft_weights": DraftWeights.INT8}, "--draft-weights is for drafting"),
        ({"draft": "model:x", "retrieval": LITTLE}, "--retrieval-... options are for"),
    ],
)
def test_draft_options_that_mean_nothing_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        DraftConfig(**options)


@pytest.mark.parametrize("name", ["chain", "tree", "ngram", "triforce", "triforce-model", *SELF])
def test_sampling_through_the_engine_keeps_the_targets_distribution(make_tiny, drafts, name):
    """Law 4 end to end: the joint distribution of three tokens, many sequences at a time."""
    folder = make_tiny("llama", **TWO)
    place = STREAMED.get(name, {})
    assert likelihood_of_three_tokens(folder, PROMPT, drafts[name], **place) > 1e-4


def likelihood_of_three_tokens(folder, prompt, draft, **place):
    """Chi-square survival of the first three sampled tokens, against the target's own passes."""
    together, runs = 72, 5
    expected, names = law_of_three_tokens(folder, tuple(prompt))
    counts = torch.zeros(3, 3, 3)
    prompts = [prompt] * together
    with engine_for(folder, prompts=prompts, draft=draft, **AT_ONCE, **place) as engine:
        for number in range(runs):
            seeded = SamplingConfig(temperature=1.0, top_k=3, seed=number * together)
            for a, b, c in generate(engine, prompts, tokens=3, sampling=seeded):
                at = tuple(names[p][1].index(t) for p, t in (((), a), ((a,), b), ((a, b), c)))
                counts[at] += 1
    return chi_square(counts, expected * runs * together)


AT_ONCE = {"tokens": 8, "prefill_chunk_tokens": 512}  # prompts, in few calls


@cache
def law_of_three_tokens(folder, prompt):
    """How likely each three tokens are, by the target's own passes, and the ids after each."""
    sampling = SamplingConfig(temperature=1.0, top_k=3, seed=0)
    expected, names = torch.zeros(3, 3, 3), {}
    with engine_for(folder, prompts=[prompt], **AT_ONCE) as engine:
        first, ids = names[()] = top_three(engine, prompt, sampling)
        for i, a in enumerate(ids):
            second, after = names[a,] = top_three(engine, [*prompt, a], sampling)
            for j, b in enumerate(after):
                third, _ = names[a, b] = top_three(engine, [*prompt, a, b], sampling)
                expected[i, j] = first[i] * second[j] * third
    return expected, names


def top_three(engine, ids, sampling):
    """Probabilities and ids of the only three tokens that may follow."""
    probs = target_probs(engine.forward([(0, ids)], reuse=True), sampling)[0]
    ids = probs.topk(3).indices.tolist()
    return probs[ids], ids


def test_packed_linears_compute_the_same_and_are_for_cpus_only():
    from offload_rt.model.formats.packed import PackedLinear, can_pack

    assert not can_pack(torch.bfloat16, torch.device("cuda:0"))
    assert not can_pack(torch.float32, torch.device("cpu"))
    if not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this CPU has no bf16 instructions")
    for bias in (True, False):
        plain = torch.nn.Linear(96, 160, bias=bias, dtype=torch.bfloat16)
        for rows in (1, 3, 16, 40):
            x = torch.randn(1, rows, 96, dtype=torch.bfloat16)
            with torch.inference_mode():
                got, expected = PackedLinear(plain)(x), plain(x)
            assert torch.allclose(got.float(), expected.float(), atol=0.02, rtol=0.02)


def test_greedy_tokens_of_logits_in_a_row_are_found_at_once(monkeypatch):
    """Whatever lies elsewhere, or is drawn, is found by itself; tokens are those of each alone."""
    logits = torch.randn(9, 300, generator=make_generator(0, "cpu"))
    logits[5, 7] = float("nan")
    parts = [*logits[:8].split([1, 4, 1, 2]), logits[3:5], logits[5:6].clone()]
    calls, real = [], deciding.likeliest
    monkeypatch.setattr(deciding, "likeliest", lambda rows: calls.append(len(rows)) or real(rows))

    def decided(rows, seeds):
        asked = [
            deciding.Checked(
                ids=[1],
                draft=Draft(TokenTree.chain(range(len(own) - 1))),
                logits=own,
                dice=Dice(make_generator(place, "cpu")),
                sampling=SamplingConfig(temperature=0.0 if seed is None else 1.0, seed=seed),
            )
            for place, (own, seed) in enumerate(zip(rows, seeds, strict=True))
        ]
        return deciding.decide(asked, HOST, AcceptRule.LOSSLESS)

    for seeds, runs in (([None] * 6, [8, 2, 1]), ([None, None, 3, None, None, None], [5, 2, 2, 1])):
        alone = [decided([own], [seed])[0] for own, seed in zip(parts, seeds, strict=True)]
        calls.clear()
        assert decided(parts, seeds) == alone
        assert calls == runs
        assert alone[2] is None
