"""A drafter is a row of `config.DRAFTERS` and a folder; nothing else has to know its name."""

import json
import sys
from types import ModuleType

import pytest
import torch
from engines import engine_for, generate

from offload_rt import config
from offload_rt.config import DraftConfig, DrafterWords, SamplingConfig
from offload_rt.costs.drafters import DraftPart
from offload_rt.errors import ConfigError
from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.base import Draft, Unlearned
from offload_rt.speculative.kind import DrafterKind, DraftMemory
from offload_rt.speculative.kinds import NAMES, kind_of


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_agrees_with_how_it_is_asked_for(name):
    kind, words = kind_of(name), config.DRAFTERS[name]
    assert 1 <= words.tokens <= kind.most_tokens
    sizes, accepted = zip(*kind.prior, strict=True)
    assert list(sizes) == sorted(set(sizes)) and list(accepted) == sorted(accepted)
    assert all(value <= size for size, value in kind.prior) and 0 < kind.prior_hits <= 1


def test_labels_and_folders_are_of_one_kind_each():
    for of in (lambda name: kind_of(name).label, lambda name: config.DRAFTERS[name].folder):
        assert len({of(name) for name in NAMES}) == len(NAMES)


class Repeat(Unlearned):
    """Proposes the last token again and again."""

    name = "repeat"

    def __init__(self, nodes):
        self.nodes = nodes

    def propose(self, ids, max_depth, max_nodes=None):
        count = min(self.nodes, max_depth, max_nodes or self.nodes)
        return Draft(TokenTree.chain([ids[-1]] * count))

    def observe(self, draft, verdict):
        pass

    def forget(self):
        pass


@pytest.fixture
def repeat(monkeypatch):
    """A drafter this package has not, as its row and its folder would bring it in."""
    folder = ModuleType("offload_rt.speculative.repeat.kind")
    folder.KIND = DrafterKind(
        label="repetition",
        most_tokens=16,
        make=lambda seat, draft: Repeat(draft.nodes),
        parts=lambda drafting, target, expected: (DraftPart(times=1, seconds=0.5),),
        memory=lambda drafting, run: DraftMemory(kept_bytes=12345),
        in_memory=lambda draft: ("one token",),
        prior=((1, 0.05), (16, 0.06)),
    )
    words = DrafterWords(about="repeat (the last token)", tokens=6, called="it", folder="repeat")
    monkeypatch.setitem(sys.modules, folder.__name__, folder)
    monkeypatch.setitem(config.DRAFTERS, "repeat", words)
    yield "repeat"
    kind_of.cache_clear()


def test_a_new_kind_runs(repeat, make_tiny):
    folder = make_tiny("llama")
    with engine_for(folder, tokens=24) as engine:
        plain = generate(engine, tokens=24)
    with engine_for(folder, tokens=24, draft=DraftConfig(draft=repeat)) as engine:
        assert isinstance(engine.drafter(0, SamplingConfig(), torch.Generator()), Repeat)
        assert generate(engine, tokens=24) == plain


def test_a_new_kind_is_asked_for_planned_and_simulated(repeat, tiny_model, offload_run):
    done = offload_run("plan", tiny_model, "--draft", repeat, "--draft-tokens", 4)
    assert done.code == 0 and "repetition" in done.out and "one token" in done.out
    plan = json.loads(offload_run("plan", tiny_model, "--draft", repeat, "--json").out)
    assert plan["drafter"] == repeat and plan["drafter_bytes"] == 12345
    base = ("simulate", tiny_model, "--draft-tokens", 4, "--acceptance", "0.5", "--json")
    slow, quick = (json.loads(offload_run(*base, "--draft", d).out) for d in (repeat, "ngram"))
    assert slow["drafting_s"] > 0.4 > quick["drafting_s"]
    done = offload_run("plan", tiny_model, "--draft", "repeat:x")
    assert done.code == 2 and "self:int4|int8, mtp, eagle3:HEAD or repeat" in done.err


@pytest.mark.parametrize(
    "draft", ["", "ngram:", "ngram:x", "model", "model:", "medusa", "tree", "self:int3"]
)
def test_ways_to_ask_for_nobody(draft):
    with pytest.raises(ConfigError, match="use auto, auto:MODEL, none, ngram, model:MODEL, "):
        DraftConfig(draft=draft)
