"""A small model with the target's tokenizer drafts, as a chain or as a tree grown best first.

While a tree grows, tokens are fed ahead behind the most probable node: what followed the same few
tokens before in the text, or else the likeliest tokens of the draft model itself when it last saw
the same two. Where it agrees, one pass makes the tree several tokens deeper, as deep as answers
that quote their prompt need.

The draft model stays on the device. Rows of a draft that were not accepted are forgotten by
comparing token ids before the next draft, so there is no bookkeeping of what was kept. The rows of
a context that has jumped (`window`) are forgotten the same way.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

import torch
from torch.nn.functional import pad

from offload_rt.config import DraftConfig, SamplingConfig
from offload_rt.costs.sizes import DRAW_ROWS
from offload_rt.errors import NumbersError
from offload_rt.kv.resident import ResidentKV
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import NO_TOKEN, likeliest, sample, target_probs
from offload_rt.speculative.base import Draft, Unlearned, Verdict, common_prefix
from offload_rt.speculative.draft_model.window import seen_tokens
from offload_rt.speculative.ngram.drafter import SuffixIndex
from offload_rt.speculative.ngram.followers import Followers
from offload_rt.speculative.ngram.suffixes import LONGEST, SHORTEST_QUOTED, most_contexts

BRANCHES = 8  # children of a node that are looked at
# What is fed ahead must have been so probable. Eight HumanEval answers then took 50 passes instead
# of 53, eight of MT-Bench 68 as before (trees of 64, Qwen2.5-Coder-1.5B with 0.5B).
SURE = math.log(0.5)
UNKNOWN = float("-inf")  # score of a node whose parent's logits are not there yet, or lack it
_SEEN_BEFORE = 2  # last tokens that must be the same
_NO_NUMBERS = "its logits are NaN or infinite"


@dataclass(slots=True)
class _Candidate:
    """A node that may become part of the draft."""

    token: int
    parent: int
    depth: int
    score: float  # log of the probability of its path; or `UNKNOWN`
    row: int = -1  # its pending row in the draft model's cache, once it was fed


class DraftModelDrafter(Unlearned):
    """Drafts for one sequence.

    Args:
        model: the shared draft model.
        config: how many nodes, chain or tree, and how much of the sequence it sees.
        capacity: tokens of the longest sequence.
    """

    name = "model"

    def __init__(self, model: Runner, config: DraftConfig, capacity: int) -> None:
        self._model, self._config = model, config
        self._sampling = SamplingConfig()
        self._generator: torch.Generator | None = None
        rows = config.cache_rows(capacity)
        self._cache = ResidentKV(model.device, model.network.kv_shapes, model.network.dtype, rows)
        # Tokens whose rows are in the cache; a row is decided by its token and those before it.
        self._ids: list[int] = []
        self._text = SuffixIndex(SHORTEST_QUOTED)
        self._followers = Followers(most_contexts(capacity), orders=(_SEEN_BEFORE,))

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        """Start a new answer.

        Args:
            sampling: a sampled chain is drawn from the same filtered distribution as the target's.
            generator: source of its randomness.
        """
        self._sampling, self._generator = sampling, generator
        self._followers.forget()  # the same answer again is drafted in the same way

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Draft a chain, or grow a tree best first."""
        config = self._config.limited(max_nodes)
        depth = min(max_depth, config.nodes)
        if depth < 1:
            return Draft()
        logits = self._catch_up(ids)
        if not config.as_tree:
            return self._chain(logits, depth)
        self._text.read(ids)
        tree, passes = self._grow(logits, ids, depth, config)
        return Draft(tree, made=(1 + passes) / config.tree_passes)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing: rows that were not accepted are forgotten by `_catch_up`."""

    def forget(self) -> None:
        """Drop all rows of the cache."""
        self._cache.truncate(0)
        self._ids.clear()
        self._text.forget()
        self._followers.forget()

    def _catch_up(self, ids: Sequence[int]) -> torch.Tensor:
        """Bring the cache up to what is seen of `ids`; returns [1, V] logits after the last."""
        seen = seen_tokens(ids, self._config.window_tokens)
        common = common_prefix(self._ids, seen[:-1])
        self._cache.truncate(common)
        del self._ids[common:]
        return self._feed(seen[common:])

    def _feed(self, tokens: Sequence[int]) -> torch.Tensor:
        logits = self._model.logits([Rows.text(self._cache, tokens)])
        self._cache.commit(range(len(tokens)))
        self._ids += tokens
        return logits

    def _chain(self, logits: torch.Tensor, depth: int) -> Draft:
        """The draft model's own continuation: likeliest tokens, or drawn ones."""
        tokens: list[int] = []
        probs: list[torch.Tensor] = []
        while True:
            if self._sampling.greedy:
                drawn = likeliest(logits)
            else:
                assert self._model.target_ids is not None  # as loaded to draft
                spare = self._model.target_ids - logits.shape[1]
                probs.append(pad(target_probs(logits, self._sampling), (0, spare)))
                assert self._generator is not None  # begin set it
                drawn = sample(probs[-1], self._generator)
            tokens += self._model.device.download(drawn)  # host sync
            if tokens[-1] == NO_TOKEN:
                raise NumbersError(_NO_NUMBERS)
            if len(tokens) == depth:
                return Draft(TokenTree.chain(tokens), torch.cat(probs) if probs else None)
            logits = self._feed(tokens[-1:])

    def _grow(
        self, logits: torch.Tensor, ids: Sequence[int], max_depth: int, config: DraftConfig
    ) -> tuple[TokenTree, int]:
        """Grow a tree best first: in each pass feed the likeliest nodes that have no children yet.

        What is kept is the likeliest nodes of all that were seen (SpecExec, arXiv:2406.02532).
        Passes end early when all of them have children.

        Returns:
            The tree, and how many passes it took.
        """
        budget, breadth = config.nodes, config.tree_breadth
        growth = _Growth(self._cache.length, budget, max_depth)
        found, logprobs = self._children(logits)[0]
        growth.add(ROOT, found, logprobs)
        self._followers.learn(ids, found, logprobs)
        wrong, passes = False, 0  # whether what was fed ahead in the last pass was
        while passes < config.tree_passes - 1:
            chosen = growth.choose(breadth)
            if not chosen:
                break
            room = 0 if wrong else breadth // 2
            guessed = growth.guess(chosen[0], self._ahead(growth, ids, chosen[0], max_depth, room))
            fed = [*chosen[: breadth - len(guessed)], *guessed]
            places, parents = growth.feed(fed)
            rows = Rows(
                cache=self._cache,
                tokens=[growth.nodes[node].token for node in fed],
                places=places,
                parents=parents,
                wanted=range(len(fed)),
            )
            logits = self._model.logits([rows])
            passes += 1
            for node, (found, logprobs) in zip(fed, self._children(logits), strict=True):
                growth.add(node, found, logprobs)
                context = [*ids[-1:], *growth.path(node, _SEEN_BEFORE)]
                self._followers.learn(context, found, logprobs)
            wrong = any(growth.nodes[node].score == UNKNOWN for node in guessed[:1])
        self._cache.commit(())
        return growth.best(), passes

    def _ahead(
        self, growth: "_Growth", ids: Sequence[int], node: int, max_depth: int, room: int
    ) -> list[int]:
        """What may follow a node, at most `room` tokens of it, before its logits are there."""
        path = growth.path(node)
        count = min(room, max_depth - 1 - len(path))  # the last of them may still have children
        if count <= 0:
            return []
        suffix = [*ids[-LONGEST:], *path][-LONGEST:]
        _, found = next(self._text.after(suffix, count), (0, []))
        found = found or list(islice(self._likely(suffix), count))
        return list(takewhile(lambda token: token < self._model.known_ids, found))

    def _likely(self, text: Sequence[int]) -> Iterator[int]:
        """What was likely after the last two tokens, then after what follows them, and so on."""
        text = list(text)
        while True:
            _, tokens, logprobs = self._followers.after(text)
            if not tokens or logprobs[0] < SURE:
                return
            yield tokens[0]
            text.append(tokens[0])

    def _children(self, logits: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        """The likeliest tokens after each row and the logs of their probabilities."""
        temperature = self._sampling.temperature or 1.0
        packed = []
        for part in logits.split(DRAW_ROWS):
            logprobs = torch.log_softmax(part.float() / temperature, dim=-1)
            best = logprobs.topk(BRANCHES, dim=-1)
            packed.append(torch.cat([best.indices.double(), best.values.double()], dim=-1))
        rows = torch.cat(packed).tolist()  # host sync
        if any(math.isnan(row[BRANCHES]) for row in rows):
            raise NumbersError(_NO_NUMBERS)
        return [([int(t) for t in row[:BRANCHES]], row[BRANCHES:]) for row in rows]


@dataclass(slots=True)
class _Growth:
    """All nodes seen while a tree grows, and which of them are rows of the cache.

    Nodes are ranked as they come, so a pass costs what its own nodes cost. A node that was once
    below the best `budget` never comes back, as scores are final once they are known.

    Attributes:
        length: committed rows of the cache; the root is the last of them.
        budget: nodes of the tree, at most.
        max_depth: of its nodes.
        ranked: of the best `budget` nodes, minus score and number, ascending.
        able: of these, those that may and do not yet have children; and some of before.
    """

    length: int
    budget: int
    max_depth: int
    nodes: list[_Candidate] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # of the rows that were fed, their rows
    positions: list[int] = field(default_factory=list)
    guessed: dict[int, int] = field(default_factory=dict)  # a node's child that was fed unseen
    ranked: list[tuple[float, int]] = field(default_factory=list)
    able: list[tuple[float, int]] = field(default_factory=list)

    def add(self, parent: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add the children of a node, in the order nodes were fed; of a wrong guess none."""
        depth, score = 1, 0.0
        if parent != ROOT:
            depth, score = self.nodes[parent].depth + 1, self.nodes[parent].score
        guess = self.guessed.get(parent)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if score + logprob == UNKNOWN:
                continue
            if guess is not None and self.nodes[guess].token == token:
                self.nodes[guess].score = score + logprob
                self._rank(guess)
            else:
                self.nodes.append(_Candidate(token, parent, depth, score + logprob))
                self._rank(len(self.nodes) - 1)

    def guess(self, node: int, tokens: Sequence[int]) -> list[int]:
        """Add a chain behind a node without children, before its logits are there."""
        made = []
        for token in tokens:
            self.nodes.append(_Candidate(token, node, self.nodes[node].depth + 1, UNKNOWN))
            made.append(len(self.nodes) - 1)
            self.guessed[node] = made[-1]
            node = made[-1]
        return made

    def path(self, node: int, last: int | None = None) -> list[int]:
        """Tokens from the root's child down to a node; the `last` of them, None: all."""
        tokens: list[int] = []
        while node != ROOT and (last is None or len(tokens) < last):
            tokens.append(self.nodes[node].token)
            node = self.nodes[node].parent
        return tokens[::-1]

    def choose(self, count: int) -> list[int]:
        """The likeliest of the best `budget` nodes that may and do not yet have children."""
        if len(self.ranked) == self.budget:
            del self.able[bisect_right(self.able, self.ranked[-1]) :]
        return [node for _, node in self.able[:count]]

    def feed(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Make nodes the next pending rows.

        Returns:
            Positions of all pending rows, and the row that each continues, or ROOT.
        """
        for node in chosen:
            made = self.nodes[node]
            made.row = len(self.fed)
            self.fed.append(node)
            self.parents.append(ROOT if made.parent == ROOT else self.nodes[made.parent].row)
            self.positions.append(self.length - 1 + made.depth)
        self.able = [place for place in self.able if self.nodes[place[1]].row < 0]
        return [*self.positions], [*self.parents]

    def best(self) -> TokenTree:
        """The likeliest nodes as a tree; a parent is never less likely than its child."""
        place = {ROOT: ROOT}
        tokens: list[int] = []
        parents: list[int] = []
        for _, node in self.ranked:
            place[node] = len(tokens)
            tokens.append(self.nodes[node].token)
            parents.append(place[self.nodes[node].parent])
        return TokenTree(tuple(tokens), tuple(parents))

    def _rank(self, node: int) -> None:
        """Take in a node whose score is known now."""
        made = self.nodes[node]
        rank = (-made.score, node)
        if len(self.ranked) == self.budget:
            if rank > self.ranked[-1]:
                return
            self.ranked.pop()
        insort(self.ranked, rank)
        if made.row < 0 and made.depth < self.max_depth:
            insort(self.able, rank)
