"""Draft from the sequence itself: what followed the same few tokens before."""

from collections.abc import Iterator, Sequence

from offload_rt.planning.suffixes import LONGEST, SHORTEST
from offload_rt.speculative.base import Draft, Verdict, common_prefix
from offload_rt.speculative.tree import ROOT, TokenTree

CONTINUATIONS = 3


class SuffixIndex:
    """Where the last few tokens of a sequence occurred in it before.

    Args:
        shortest: fewer tokens are not looked up.
    """

    def __init__(self, shortest: int = SHORTEST) -> None:
        self._shortest = shortest
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where it ended, ascending

    def read(self, ids: Sequence[int]) -> None:
        """Bring the index up to `ids`: what they do not begin with is taken out again."""
        known = self._ids
        common = common_prefix(known, ids)
        for end in range(len(known), common, -1):
            for size in range(self._shortest, min(LONGEST, end) + 1):
                ngram = tuple(known[end - size : end])
                self._ends[ngram].pop()  # the latest of them, as ends ascend
                if not self._ends[ngram]:
                    del self._ends[ngram]
        for end in range(common + 1, len(ids) + 1):
            for size in range(self._shortest, min(LONGEST, end) + 1):
                self._ends.setdefault(tuple(ids[end - size : end]), []).append(end)
        self._ids = list(ids)

    def after(self, suffix: Sequence[int], count: int) -> Iterator[list[int]]:
        """What followed the same tokens, longest suffixes first, then the latest.

        Args:
            suffix: tokens to look for; its own place in the sequence does not count.
            count: tokens of a continuation, at most.
        """
        for size in range(min(LONGEST, len(suffix)), self._shortest - 1, -1):
            for end in reversed(self._ends.get(tuple(suffix[-size:]), ())):
                if following := self._ids[end : end + count]:
                    yield following

    def forget(self) -> None:
        """Empty the index."""
        self._ids.clear()
        self._ends.clear()


class NgramDrafter:
    """Suffix lookup over prompt and output; several continuations become a tree.

    Args:
        draft_tokens: nodes of a draft, at most.
    """

    name = "ngram"

    def __init__(self, draft_tokens: int) -> None:
        self._draft_tokens = draft_tokens
        self._index = SuffixIndex()

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Propose what followed the longest suffixes of `ids` that occurred before."""
        self._index.read(ids)
        nodes = self._draft_tokens if max_nodes is None else min(max_nodes, self._draft_tokens)
        continuations: list[Sequence[int]] = []
        for following in self._index.after(ids[-LONGEST:], min(max_depth, nodes)):
            if not any(following == list(known[: len(following)]) for known in continuations):
                continuations.append(following)
            if len(continuations) == CONTINUATIONS:
                break
        return _joined(continuations, nodes)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing to learn: the tokens themselves come with the next call."""

    def forget(self) -> None:
        """Empty the index."""
        self._index.forget()


def _joined(continuations: Sequence[Sequence[int]], nodes: int) -> Draft:
    """A draft of them; with several, fewer nodes are shared differently."""
    return Draft(merge(continuations, nodes), nested=len(continuations) < 2)


def merge(continuations: Sequence[Sequence[int]], max_nodes: int) -> TokenTree:
    """Join continuations into one tree, common beginnings once.

    The first gets half of the nodes, or all if it is alone; the others share the rest.
    """
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for index, continuation in enumerate(continuations):
        rest = max_nodes - len(tokens)
        share = rest if index == len(continuations) - 1 else -(-rest // 2)
        node, last = ROOT, len(tokens) + share
        for token in continuation:
            if (node, token) not in known:
                if len(tokens) >= last:
                    break
                known[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = known[node, token]
    return TokenTree(tuple(tokens), tuple(parents))
