"""The kinds of drafters by their names in --draft: each is the `KIND` of a folder's `kind.py`.

To add one: its words in `config.DRAFTERS`, and its folder with `kind.py` and `drafter.py`.
"""

from functools import cache
from importlib import import_module

from offload_rt.config import DRAFTERS
from offload_rt.speculative.kind import DrafterKind

NAMES = tuple(name for name, words in DRAFTERS.items() if words.tokens)


@cache
def kind_of(name: str) -> DrafterKind:
    """The kind of that name, one of `NAMES`."""
    kind = import_module(f"offload_rt.speculative.{DRAFTERS[name].folder}.kind").KIND
    assert isinstance(kind, DrafterKind)
    return kind
