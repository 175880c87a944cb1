"""Trees of a draft model: the likeliest nodes, whatever is fed ahead of what is known."""

import heapq
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.config import DraftConfig, DraftShape, SamplingConfig
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.speculative.draft_model import drafter as draft_model
from offload_rt.speculative.draft_model.drafter import DraftModelDrafter
from offload_rt.speculative.growing import BRANCHES, GREEDY_POWER
from offload_rt.speculative.self_draft.drafter import SelfDrafter

VOCAB = 32


class Rows:
    """A cache that only counts."""

    def __init__(self, *_):
        self.length = 0

    def truncate(self, length):
        self.length = length

    def commit(self, keep):
        self.length += len(keep)


class Known:
    """A draft model whose logits are a function of the path below the root."""

    device, target_ids, known_ids = None, VOCAB, VOCAB

    def __init__(self, law):
        self.law, self.fed, self.passes = law, [], []

    class network:
        kv_shapes, dtype = (), torch.float32

    def draft_logits(self, part, *, recorded=True):
        if part.parents is None:
            self.fed, self.passes = [], []
            return self.law(())[None]
        self.fed += part.tokens
        self.passes.append(len(part.tokens))
        positions = part.places[-len(part.tokens) :]
        assert len(positions) == len(part.tokens) == len(part.wanted)
        assert len(part.parents) == len(part.places) == len(self.fed)
        rows = []
        for row, position in enumerate(positions, len(self.fed) - len(positions)):
            path = self.path(part.parents, row)
            assert position == part.cache.length - 1 + len(path)
            rows.append(self.law(path))
        return torch.stack(rows)

    def path(self, parents, row):
        path = []
        while row != ROOT:
            path.append(self.fed[row])
            assert parents[row] < row
            row = parents[row]
        return tuple(reversed(path))


@contextmanager
def drafting(law, passes=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_model, "ResidentKV", Rows)
        if passes is not None:
            patch.setattr(DraftConfig, "tree_passes", property(lambda _: passes))
        yield lambda nodes: DraftModelDrafter(
            Known(law),
            DraftConfig(draft="model:x", draft_tokens=nodes, shape=DraftShape.TREE),
            100,
        )


def random_law(seed):
    def law(path):
        noise = torch.Generator().manual_seed(hash((seed, path)) % 2**31)
        return 2 * torch.randn(VOCAB, generator=noise)

    return law


def likeliest(law, nodes, depth):
    """Paths of the likeliest nodes, of which a child is among the likeliest of its parent."""
    found, heap = [], [(0.0, ())]
    while heap and len(found) < nodes + 1:
        score, path = heapq.heappop(heap)
        found.append(path)
        if len(path) < depth:
            logprobs = torch.log_softmax(law(path), dim=-1)
            best = logprobs.topk(BRANCHES)
            for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                heapq.heappush(heap, (score - logprob, (*path, token)))
    return {path for path in found if path}


def paths_of(tree):
    return {tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree))}


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    nodes=st.integers(2, 20),
    depth=st.integers(1, 9),
)
def test_with_passes_enough_it_is_the_likeliest_nodes_whatever_the_text_says(
    seed, ids, nodes, depth
):
    law = random_law(seed)
    with drafting(law, passes=80) as drafter_for:
        tree = drafter_for(nodes).propose(ids, depth).tree
    assert paths_of(tree) == likeliest(law, nodes, min(depth, nodes))
    assert len(paths_of(tree)) == len(tree)


@pytest.mark.parametrize(("temperature", "power"), [(0.0, GREEDY_POWER), (1.0, 1.0)])
def test_it_tells_how_probable_its_nodes_are(temperature, power):
    law, told = random_law(3), SamplingConfig(temperature=temperature)
    with drafting(law, passes=80) as drafter_for:
        drafter = drafter_for(12)
        drafter.begin(told, torch.Generator())
        draft = drafter.propose([0, 1], 5)
    for node, likely in enumerate(draft.likely):
        path, log = tuple(draft.tree.tokens[n] for n in draft.tree.path(node)), 0.0
        for depth, token in enumerate(path):
            log += float(torch.log_softmax(law(path[:depth]), dim=-1)[token])
        assert likely == pytest.approx(math.exp(power * log), rel=1e-4)
    assert len(draft.likely) == len(draft.tree) == 12
    assert list(draft.likely) == sorted(draft.likely, reverse=True)


class KnownBehind(Known):
    """The same over a cache whose first pending row is the root's."""

    def draft_logits(self, part, *, recorded=True):
        if part.parents is None:
            self.fed, self.passes = [], []
            assert list(part.places) == [part.cache.length] and part.cache.pending == 0
        part.cache.pending += len(part.tokens)
        self.fed += part.tokens
        rows = []
        parents = part.parents or [ROOT]
        assert len(parents) == len(part.places) == len(self.fed)
        for row in range(len(self.fed) - len(part.tokens), len(self.fed)):
            root, *path = self.path(parents, row)
            assert part.places[row] == part.cache.length + len(path)
            assert root == self.fed[0]
            rows.append(self.law(tuple(path)))
        return torch.stack(rows)


class RowsBehind(Rows):
    """The target's cache, all but the root committed."""

    pending = 0

    def truncate(self, length):
        assert length == self.length
        self.pending = 0


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    nodes=st.integers(2, 20),
    depth=st.integers(1, 9),
)
def test_behind_a_pending_root_the_same_tree_grows_and_no_row_stays(seed, ids, nodes, depth):
    law, cache = random_law(seed), RowsBehind()
    cache.length = len(ids) - 1
    config = DraftConfig(draft="self:int4", draft_tokens=nodes, shape=DraftShape.TREE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftConfig, "tree_passes", property(lambda _: 80))
        patch.setattr("offload_rt.speculative.self_draft.drafter.SHARPENED", 1.0)
        drafter = SelfDrafter(KnownBehind(law), cache, config, 100)
        tree = drafter.propose(ids, depth).tree
    assert paths_of(tree) == likeliest(law, nodes, min(depth, nodes))
    assert cache.pending == 0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), gain=st.floats(0.05, 1.5))
def test_no_pass_is_made_and_no_row_fed_that_would_add_too_little(seed, gain):
    law, cache, fed = random_law(seed), RowsBehind(), []
    cache.length = 2
    config = DraftConfig(draft="self:int4", draft_tokens=24, shape=DraftShape.TREE)

    def noted(path):
        if path:
            fed.append(path)
        return law(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload_rt.speculative.self_draft.drafter.SHARPENED", 1.0)
        patch.setattr("offload_rt.speculative.growing.Grower._ahead", lambda *_: [])
        model = KnownBehind(noted)
        drafter = SelfDrafter(model, cache, config, 100, least_gain=gain)
        draft = drafter.propose([31, 30, 29], 20)

    def likely(path):
        logs = [torch.log_softmax(law(path[:at]), dim=-1)[path[at]] for at in range(len(path))]
        return float(torch.stack(logs).sum().exp())

    assert all(likely(path) * config.tree_breadth >= gain - 1e-6 for path in fed)
    whole = SelfDrafter(KnownBehind(law), cache, config, 100).propose([31, 30, 29], 20)
    assert draft.made <= whole.made
    roots = law(()).softmax(-1).topk(config.tree_breadth).values
    kept = float(roots.sum()) >= gain
    assert bool(fed) == kept


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    ids=st.lists(st.integers(0, 1), min_size=1, max_size=60),
    nodes=st.integers(9, 100),
)
def test_no_pass_and_no_cache_is_larger_than_planned(seed, ids, nodes):
    with drafting(random_law(seed)) as drafter_for:
        drafter = drafter_for(nodes)
        draft = drafter.propose(ids, 100)
        config, made = drafter._config, drafter._model.passes
    assert draft.made == pytest.approx((1 + len(made)) / config.tree_passes)  # one catches up
    assert max(made) <= config.tree_breadth and len(made) < config.tree_passes
    assert sum(made) <= config.scratch_rows


def counting(path):
    """Goes on counting, nearly surely: from the last token, 29 before the root."""
    logits = torch.zeros(VOCAB)
    logits[((path[-1] if path else 29) + 1) % 30] = 12.0
    return logits


def test_what_the_text_said_before_makes_a_tree_deeper_than_its_passes():
    with drafting(counting) as drafter_for:
        drafter = drafter_for(24)
        alone = drafter.propose([31] * 5, 100).tree
        drafter.begin(SamplingConfig(), torch.Generator())
        quoting = drafter.propose([*range(30)] * 2, 100).tree
        passes = drafter._config.tree_passes
        assert drafter.propose([*range(30)] * 2, 6).tree.depths[-1] <= 6
    assert max(alone.depths) == passes
    assert quoting == TokenTree.chain(range(24))


def test_what_was_likely_before_makes_a_tree_deeper_than_its_passes():
    with drafting(counting) as drafter_for:
        drafter = drafter_for(24)
        first, again = (drafter.propose([31], 100) for _ in range(2))
        drafter.begin(SamplingConfig(), torch.Generator())
        anew = drafter.propose([31], 100)
    assert max(first.tree.depths) == drafter._config.tree_passes
    assert max(again.tree.depths) > drafter._config.tree_passes + 5
    assert anew == first


def test_what_was_hardly_likely_is_not_fed_ahead():
    def unsure(path):
        logits = torch.full((VOCAB,), float("-inf"))
        logits[[2, 3, 4]] = torch.tensor([1.0, 0.9, 0.8])  # none has half of it
        return logits

    with drafting(unsure) as drafter_for:
        drafter = drafter_for(24)
        fed = []
        for _ in range(2):
            drafter.propose([31], 100)
            fed.append(drafter._model.fed)
    assert fed[0] == fed[1]


def test_a_text_that_goes_on_otherwise_is_not_believed():
    text = [0, 1, 2, 3, 7, 7, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    with drafting(counting) as drafter_for:
        tree = drafter_for(24).propose(text, 100).tree
    assert (0, 1, 2, 3, 4) in paths_of(tree)
    assert (0, 1, 2, 3, 7, 7) not in paths_of(tree)


def test_a_wrong_guess_is_in_no_tree_even_where_there_is_room_for_it():
    def sure(path):
        logits = torch.full((VOCAB,), float("-inf"))
        logits[((path[-1] if path else 9) + 1) % 10] = 0.0
        return logits

    text = [0, 1, 2, 7, 1, 2, 3, 7, 2, 3, 4, 7, 3, 4, 5, 7, 9]
    with drafting(sure) as drafter_for:
        drafter = drafter_for(24)
        tree = drafter.propose(text, 100).tree
        assert sum(drafter._model.passes) > len(drafter._model.passes)  # some rows were guesses
    assert tree == TokenTree.chain([token % 10 for token in range(len(tree))])


def test_a_forgotten_text_is_not_quoted():
    with drafting(counting) as drafter_for:
        drafter = drafter_for(24)
        drafter.propose([*range(30)] * 2, 100)
        drafter.forget()
        text = drafter._grower._text
        assert not text._ends and not text._ids
        assert not drafter._grower._followers._kept
        tree = drafter.propose([31] * 5, 100).tree
        assert max(tree.depths) == drafter._config.tree_passes
