"""The kinds of drafters by their names in --draft: each is the `KIND` of a folder's `kind.py`.

To add one: its words in `config.DRAFTERS`, and its folder with `kind.py` and `drafter.py`.
"""

from dataclasses import replace
from functools import cache
from importlib import import_module

from offload_rt.config import DRAFTERS, DraftConfig
from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.workload import PlacedModel
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.speculative.kind import DraftedRun, DrafterKind, DraftMemory

# Paths down a tree for each of its nodes: 0.2 to 0.3 where much is accepted and of n-grams, 0.45
# where little is (docs/RESULTS.md, "Trees on models with recurrent states").
_LEAVES = 0.3
NAMES = tuple(name for name, words in DRAFTERS.items() if words.tokens)


def draft_parts(
    drafting: Drafting, target: PlacedModel, expected: Expected
) -> tuple[DraftPart, ...]:
    """What a drafter does for the drafts of one step.

    Args:
        drafting: who drafts, and how much; `draft_weights` are settled.
        target: that it drafts for.
        expected: how often it is right.
    """
    config = drafting.config
    return kind_of(config.kind).parts(drafting, target, expected) if config.nodes else ()


def branches_of(config: DraftConfig) -> float:
    """Paths down a draft, on average; 1 where it is a chain."""
    if not config.nodes or kind_of(config.kind).tree_depth(config, 1) is None:
        return 1.0
    return max(1.0, _LEAVES * config.nodes)


def draft_memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    """Device memory of a drafter."""
    if not drafting.config.nodes:
        return DraftMemory()
    return kind_of(drafting.config.kind).memory(completed(drafting, run.target), run)


def completed(drafting: Drafting, target: Checkpoint) -> Drafting:
    """The same with the headers of what drafts, where the target's own files hold that."""
    inside = kind_of(drafting.config.kind).inside if drafting.config.nodes else None
    return drafting if inside is None else replace(drafting, checkpoint=inside(target))


@cache
def kind_of(name: str) -> DrafterKind:
    """The kind of that name, one of `NAMES`."""
    kind = import_module(f"offload_rt.speculative.{DRAFTERS[name].folder}.kind").KIND
    assert isinstance(kind, DrafterKind)
    return kind
