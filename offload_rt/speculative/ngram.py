"""Draft from the sequence itself: what followed the same few tokens before."""

from collections.abc import Iterator, Sequence

from offload_rt.planning.suffixes import LONGEST, SHORTEST
from offload_rt.speculative.base import Draft, Verdict, common_prefix
from offload_rt.speculative.tree import ROOT, TokenTree

CONTINUATIONS = 3
_MEMORY = 8  # drafts the mean of what stood looks back, about


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


class SelectiveNgramDrafter:
    """The same, kept back while so little of it stands that checking it costs more than it saves.

    What is kept back is compared with the tokens that come, so a text that begins to quote is
    noticed. Tokens alone decide, no times: a seeded answer stays the same.

    Args:
        draft_tokens: nodes of a draft, at most.
        worthwhile: tokens of a draft that must stand, on average.
    """

    name = "ngram"

    def __init__(self, draft_tokens: int, worthwhile: float) -> None:
        self._drafter, self._worthwhile = NgramDrafter(draft_tokens), worthwhile
        self._stood = 2.0 * worthwhile  # mean over the latest drafts; hopeful at first
        self._held: tuple[int, TokenTree] | None = None  # where it begins, what was kept back

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Propose what an `NgramDrafter` does, or nothing."""
        if self._held is not None and not self._judge(ids):
            return Draft()
        draft = self._drafter.propose(ids, max_depth, max_nodes)
        if self._stood >= self._worthwhile or not len(draft.tree):
            return draft
        self._held = (len(ids), draft.tree)
        return Draft()

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Note what stood."""
        if len(draft.tree):
            self._note(len(verdict.path))

    def forget(self) -> None:
        """Empty the index, and hope again."""
        self._drafter.forget()
        self._stood, self._held = 2.0 * self._worthwhile, None

    def _judge(self, ids: Sequence[int]) -> bool:
        """Compare what was kept back with what came; returns whether that is decided."""
        assert self._held is not None
        start, tree = self._held
        nodes = zip(tree.parents, tree.tokens, strict=True)
        children = {place: node for node, place in enumerate(nodes)}
        node, stood = ROOT, 0
        for token in ids[start:]:
            found = children.get((node, token))
            if found is None:
                break
            node, stood = found, stood + 1
        else:
            if len(ids) >= start:  # all of it right so far; a token that is not there decides
                return False
        if len(ids) > start:  # else the tokens behind it were taken back
            self._note(stood)
        self._held = None
        return True

    def _note(self, stood: int) -> None:
        self._stood += (stood - self._stood) / _MEMORY


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
