"""Draft without a model: phrases of the text, and the target's own earlier guesses.

Two sources cost nothing. The text itself: what followed where its last few tokens occurred before
(prompt lookup). And the passes made so far: the target's likeliest tokens when it last saw the same
one or two tokens (`followers`). Both propose candidates with an estimate of their probability. The
most probable paths are the draft, a tree.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import islice

from offload_rt.kv.prefixes import common_prefix
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.ngram.followers import CONTEXT, Followers, Likely
from offload_rt.speculative.ngram.suffixes import LONGEST, SHORTEST

QUOTES = 3  # at most, of the tokens that followed the same suffix before
# How often what is known is right, roughly, on summaries, MT-Bench and HumanEval. They only order
# what is drafted and need no precision. What followed last time, by tokens that were the same, ...
_QUOTE = (0.0, 0.12, 0.3, 0.45, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92)
_OTHER_QUOTE = 0.3  # ... and what followed at other times, against that
_FOLLOWER = {1: 0.55, 2: 0.8}  # probability of a likely token then, against that now
_LEAST = 1e-3  # what is less probable costs more than it gives
_LESS = 1.0 - 1e-9  # for rounding
_LOOKED_AT = 16  # places where a suffix occurred, the latest
_MEMORY = 8  # drafts the mean of accepted tokens looks back, about


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

    def after(self, suffix: Sequence[int], count: int) -> Iterator[tuple[int, list[int]]]:
        """What followed the same tokens, longest suffixes first, then the latest.

        Args:
            suffix: tokens to look for, by the last few; its own place in the sequence does not
                count.
            count: tokens of a continuation, at most.

        Returns:
            How many tokens of the suffix were the same, and the continuation.
        """
        for size, end in self._found(suffix):
            yield self._same(end, suffix, size), self._ids[end : end + count]

    def next_tokens(self, suffix: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
        """The same with single tokens, none twice, and at most `most` of them."""
        ids, seen = self._ids, []
        for size, end in self._found(suffix):
            token = ids[end]
            if token not in seen:
                seen.append(token)
                # A place with more in common would have come before, by a longer suffix.
                yield size if size < LONGEST else self._same(end, suffix, size), token
                if len(seen) == most:
                    return

    def has(self, suffix: tuple[int, ...], size: int) -> bool:
        """Whether that many of the last tokens may have occurred; always if some did not."""
        size = min(size, LONGEST)
        return size < self._shortest or suffix[-size:] in self._ends

    def _found(self, suffix: Sequence[int]) -> Iterator[tuple[int, int]]:
        """How many tokens were looked up, and where they ended, if something follows."""
        places: list[list[int]] = []
        for size in range(self._shortest, min(LONGEST, len(suffix)) + 1):
            ends = self._ends.get(tuple(suffix[-size:]))
            if ends is None:
                break  # nor is a longer one there
            places.append(ends)
        length, size = len(self._ids), self._shortest + len(places)
        for ends in reversed(places):
            size -= 1
            for end in ends[: -_LOOKED_AT - 1 : -1]:
                if end < length:
                    yield size, end

    def forget(self) -> None:
        """Empty the index."""
        self._ids.clear()
        self._ends.clear()

    def _same(self, end: int, suffix: Sequence[int], size: int) -> int:
        """How many tokens before `end` are those of a suffix, `size` of which are known to be."""
        while size < min(end, len(suffix)) and self._ids[end - size - 1] == suffix[-size - 1]:
            size += 1
        return size


class NgramDrafter:
    """Grows a tree of what the text and the passes before make probable, best first.

    Args:
        draft_tokens: nodes of a draft, at most.
        contexts: last tokens for which it is kept what was likely after them.
        explores: nodes that would be left over are tokens that were likely of late and were not
            seen yet. Hardly one is accepted, but what follows them is known from then on: 64 nodes
            gave 2.4 tokens per pass instead of 2.1 (nine prompts, Qwen2.5-Coder-1.5B). On a CPU
            their rows take more time than that saves.
    """

    name = "ngram"
    learns = True

    def __init__(self, draft_tokens: int, contexts: int, *, explores: bool = False) -> None:
        self._draft_tokens, self._explores = draft_tokens, explores
        self._index, self._followers = SuffixIndex(), Followers(contexts)

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Propose the most probable paths; of a smaller number of nodes, the first of them."""
        self._index.read(ids)
        nodes = self._draft_tokens if max_nodes is None else min(max_nodes, self._draft_tokens)
        tokens: list[int] = []
        parents: list[int] = []
        depths = [0]
        texts = [
            tuple(ids[1 - len(_QUOTE) :])
        ]  # the last tokens of the root's and each node's path
        heap: list[tuple[float, int, int, int]] = []  # -probability, order, parent, token
        offered: list[float] = []  # what was ever in the heap, of it the most probable
        least = _LEAST  # less probable paths are not drafted

        node, prob = ROOT, 1.0
        while True:
            if depths[node + 1] < max_depth and prob * _QUOTE[-1] >= least:
                order = len(tokens)
                for token, share in self._candidates(texts[node + 1], _LESS * least / prob):
                    if (product := prob * share) >= least:
                        heappush(heap, (-product, order, node, token))
                        offered.append(product)
            if not heap or len(tokens) >= nodes:
                break
            if len(offered) >= nodes + nodes // 8 + 8:
                offered.sort(reverse=True)
                del offered[nodes:]
                least = max(least, offered[-1])
            negative, _, parent, token = heappop(heap)
            node, prob = len(tokens), -negative
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent + 1] + 1)
            texts.append((*texts[parent + 1], token)[1 - len(_QUOTE) :])
        if self._explores:
            drafted = set(tokens)
            unseen = (t for t in self._followers.unknown() if t not in drafted)
            tokens += islice(unseen, nodes - len(tokens))
            parents += [ROOT] * (len(tokens) - len(parents))
        return Draft(TokenTree(tuple(tokens), tuple(parents)))

    def learn(self, ids: Sequence[int], tree: TokenTree, likely: Likely) -> None:
        """Keep the likeliest tokens after each row."""
        contexts = [tuple(ids[-CONTEXT:])]
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            contexts.append((*contexts[parent + 1], token)[-CONTEXT:])
        for context, tokens, probs in zip(contexts, likely.tokens, likely.probs, strict=True):
            self._followers.learn(context, tokens, probs)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing to learn: the tokens themselves come with the next call."""

    def forget(self) -> None:
        """Empty the index, and forget what was likely."""
        self._index.forget()
        self._followers.forget()

    def _candidates(self, text: tuple[int, ...], least: float) -> Iterable[tuple[int, float]]:
        """What may follow a text, and about how probable it is; of less than `least` little."""
        order, tokens, probs = self._followers.after(text)
        share = _FOLLOWER.get(order, 0.0)
        found = {}
        for token, prob in zip(tokens, probs, strict=True):
            if share * prob < least:
                break  # they are sorted
            found[token] = share * prob
        if not self._index.has(text, bisect_left(_QUOTE, least, 1)):
            return found.items()
        share = 1.0
        for size, token in self._index.next_tokens(text, QUOTES):
            quoted = share * _QUOTE[min(size, len(_QUOTE) - 1)]
            if quoted > found.get(token, 0.0):
                found[token] = quoted
            share = _OTHER_QUOTE
        return found.items()


class SelectiveNgramDrafter:
    """The same, kept back while too little of it is accepted for checking to pay.

    What is kept back is compared with the tokens that come, so a text that begins to quote is
    noticed. Tokens alone decide, no times: a seeded answer stays the same.

    Args:
        drafter: whose drafts are kept back.
        worthwhile: tokens of a draft that must stand, on average.
    """

    name = "ngram"
    learns = True

    def __init__(self, drafter: NgramDrafter, worthwhile: float) -> None:
        self._drafter, self._worthwhile = drafter, worthwhile
        self._accepted = 2.0 * worthwhile  # mean over the latest drafts; hopeful at first
        self._held: tuple[int, TokenTree] | None = None  # where it begins, what was kept back

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Propose what an `NgramDrafter` does, or nothing."""
        if self._held is not None and not self._judge(ids):
            return Draft()
        draft = self._drafter.propose(ids, max_depth, max_nodes)
        if self._accepted >= self._worthwhile or not len(draft.tree):
            return draft
        self._held = (len(ids), draft.tree)
        return Draft()

    def learn(self, ids: Sequence[int], tree: TokenTree, likely: Likely) -> None:
        """Keep the likeliest tokens after each row."""
        self._drafter.learn(ids, tree, likely)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Note what was accepted."""
        if len(draft.tree):
            self._note(len(verdict.path))

    def forget(self) -> None:
        """Empty the index, and hope again."""
        self._drafter.forget()
        self._accepted, self._held = 2.0 * self._worthwhile, None

    def _judge(self, ids: Sequence[int]) -> bool:
        """Compare what was kept back with what came; returns whether that is decided."""
        assert self._held is not None
        start, tree = self._held
        path, undecided = tree.followed(ids[start:])
        if undecided and len(ids) >= start:  # right so far; a token that is not there decides
            return False
        if len(ids) > start:  # else the tokens behind it were taken back
            self._note(len(path))
        self._held = None
        return True

    def _note(self, accepted: int) -> None:
        self._accepted += (accepted - self._accepted) / _MEMORY
