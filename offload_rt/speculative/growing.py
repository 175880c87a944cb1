"""Trees of a model that drafts, grown best first; and what it draws of a chain.

While a tree grows, tokens are fed ahead behind the most probable node: what followed the same few
tokens before in the text, or else the likeliest tokens of the model itself when it last saw the
same two. Where it agrees, one pass makes the tree several tokens deeper, as deep as answers that
quote their prompt need.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

import torch
from torch.nn.functional import pad

from offload_rt.config import DraftConfig, SamplingConfig
from offload_rt.costs.sizes import DRAW_ROWS
from offload_rt.errors import NumbersError
from offload_rt.kv.base import KVCache
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import NO_TOKEN, likeliest, sample, target_probs
from offload_rt.speculative.base import Draft, Laws, Unlearned
from offload_rt.speculative.ngram.drafter import SuffixIndex
from offload_rt.speculative.ngram.followers import Followers
from offload_rt.speculative.ngram.suffixes import LONGEST, SHORTEST_QUOTED, most_contexts

BRANCHES = 8  # children of a node that are looked at
# What is fed ahead must have been so probable. Eight HumanEval answers then took 50 passes instead
# of 53, eight of MT-Bench 68 as before (trees of 64, Qwen2.5-Coder-1.5B with 0.5B).
SURE = math.log(0.5)
# A greedy answer takes the target's likeliest token more often than a drafter holds it probable: of
# a node of probability p about p to this power were accepted (0.8 of MT-Bench, 0.9 of HumanEval;
# docs/RESULTS.md, "A first run's draft size").
GREEDY_POWER = 0.85
UNKNOWN = float("-inf")  # score of a node whose parent's logits are not there yet, or lack it
_SEEN_BEFORE = 2  # last tokens that must be the same
NO_NUMBERS = "its logits are NaN or infinite"

# A draft in the making: rows that it wants fed, for [R, V] logits of the wanted ones, until it is
# made. So one pass may feed the rows of several (`together`).
Feeding = Generator[Rows, torch.Tensor, torch.Tensor]
Drafting = Generator[Rows, torch.Tensor, Draft]


@dataclass(slots=True)
class _Candidate:
    """A node that may become part of the draft."""

    token: int
    parent: int
    depth: int
    score: float  # log of the probability of its path; or `UNKNOWN`
    row: int = -1  # its pending row in the draft model's cache, once it was fed


class Grower:
    """Grows trees behind one sequence.

    Args:
        model: drafts.
        cache: of the model, or what it shares; nodes are pending rows there.
        capacity: tokens of the longest sequence.
        greedy_temperature: of the model's distribution where answers are greedy. The nearer the
            model is to the target, the surer it is of the target's likeliest token, however
            unlikely that is itself.
        ahead: rows may be fed before their parents' logits are there.
    """

    def __init__(
        self,
        model: Runner,
        cache: KVCache,
        capacity: int,
        *,
        greedy_temperature: float = 1.0,
        ahead: bool = True,
    ) -> None:
        self._model, self.cache, self._ahead_of_parents = model, cache, ahead
        self._greedy_temperature = greedy_temperature
        self._sampling = SamplingConfig()
        self._text = SuffixIndex(SHORTEST_QUOTED)
        self._followers = Followers(most_contexts(capacity), orders=(_SEEN_BEFORE,))

    def begin(self, sampling: SamplingConfig) -> None:
        """Start a new answer."""
        self._sampling = sampling
        self._followers.forget()  # the same answer again is drafted in the same way

    def forget(self) -> None:
        """Drop what was read and learned."""
        self._text.forget()
        self._followers.forget()

    def grow(
        self,
        logits: torch.Tensor,
        ids: Sequence[int],
        max_depth: int,
        config: DraftConfig,
        *,
        root_pends: bool,
        least_gain: float = 0.0,
    ) -> Drafting:
        """Grow a tree best first: in each pass feed the likeliest nodes that have no children yet.

        What is kept is the likeliest nodes of all that were seen (SpecExec, arXiv:2406.02532).
        Passes end early when all of them have children, or when the next one would gain too little:
        a token behind a fed node is of use if that is accepted. All rows stay pending.

        Args:
            logits: [1, V] after the root.
            ids: the sequence so far; its last token is the root.
            max_depth: of nodes.
            config: how many nodes and passes.
            root_pends: the root's row is the first pending one; else the last committed.
            least_gain: accepted tokens that a pass must be expected to add.

        Returns:
            The tree, how probable its nodes are, and the share of the passes that it took.
        """
        if self._ahead_of_parents:
            self._text.read(ids)
        budget, breadth, cache = config.nodes, config.tree_breadth, self.cache
        growth = _Growth(cache.length - (not root_pends), budget, max_depth)
        if root_pends:
            growth.take_root()
        found, logprobs = self._children(logits)[0]
        growth.add(ROOT, found, logprobs)
        self._followers.learn(ids, found, logprobs)
        wrong, passes = False, 0  # whether what was fed ahead in the last pass was
        while passes < config.tree_passes - 1:
            chosen = growth.choose(breadth)
            if not chosen or growth.likelihood(chosen) < least_gain:
                break
            # A row costs a part of a pass, so it must add that part of what a pass must.
            chosen = [n for n in chosen if growth.likelihood([n]) * breadth >= least_gain]
            room = 0 if wrong or not self._ahead_of_parents else breadth // 2
            guessed = growth.guess(chosen[0], self._ahead(growth, ids, chosen[0], max_depth, room))
            fed = [*chosen[: breadth - len(guessed)], *guessed]
            places, parents = growth.feed(fed)
            rows = Rows(
                cache=cache,
                tokens=[growth.nodes[node].token for node in fed],
                places=places,
                parents=parents,
                wanted=range(len(fed)),
            )
            logits = yield rows
            passes += 1
            for node, (found, logprobs) in zip(fed, self._children(logits), strict=True):
                growth.add(node, found, logprobs)
                context = [*ids[-1:], *growth.path(node, _SEEN_BEFORE)]
                self._followers.learn(context, found, logprobs)
            wrong = any(growth.nodes[node].score == UNKNOWN for node in guessed[:1])
        greedy = self._sampling.greedy and self._greedy_temperature == 1.0
        power = GREEDY_POWER if greedy else 1.0
        likely = tuple(math.exp(-power * score) for score, _ in growth.ranked)
        return Draft(growth.best(), made=(1 + passes) / config.tree_passes, likely=likely)

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
        temperature = self._sampling.temperature or self._greedy_temperature
        packed = []
        for part in logits.split(DRAW_ROWS):
            logprobs = torch.log_softmax(part.float() / temperature, dim=-1)
            best = logprobs.topk(BRANCHES, dim=-1)
            packed.append(torch.cat([best.indices.double(), best.values.double()], dim=-1))
        rows = torch.cat(packed).tolist()  # host sync
        if any(math.isnan(row[BRANCHES]) for row in rows):
            raise NumbersError(NO_NUMBERS)
        return [([int(t) for t in row[:BRANCHES]], row[BRANCHES:]) for row in rows]


class GrowingDrafter(Unlearned, ABC):
    """What drafters have in common that draw a chain from a network, or grow a tree with it.

    Args:
        model: the network.
        grower: grows its trees.
        config: how many nodes, chain or tree.
    """

    def __init__(self, model: Runner, grower: Grower, config: DraftConfig) -> None:
        self._model, self._grower, self._config = model, grower, config
        self._sampling = SamplingConfig()
        self._generator: torch.Generator | None = None

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        """Start a new answer.

        Args:
            sampling: a sampled chain is drawn from the same filtered distribution as the target's.
            generator: source of its randomness.
        """
        self._sampling, self._generator = sampling, generator
        self._grower.begin(sampling)

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Draft a chain, or grow a tree best first."""
        making = self.proposing(ids, max_depth, max_nodes)
        try:
            rows = next(making)
            while True:
                rows = making.send(self.feed(rows))
        except StopIteration as end:
            made: Draft = end.value
            return made
        finally:
            making.close()

    @abstractmethod
    def proposing(
        self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None
    ) -> Drafting:
        """Make a draft as `propose` does, of logits that are sent in."""

    @abstractmethod
    def feed(self, rows: Rows) -> torch.Tensor:
        """Feed what a draft in the making wants; returns [R, V] logits of the wanted rows."""

    def shared_model(self, max_nodes: int | None) -> Runner | None:
        """The network, if rows of other sequences may be in the passes of such a draft.

        Not where passes are recorded, as each is of one sequence.
        """
        config = self._config.limited(max_nodes)
        together = config.is_made_together(sampled=not self._sampling.greedy)
        return self._model if together and not self._model.records(self._grower.cache) else None

    def _draw_chain(
        self, logits: torch.Tensor, depth: int, feed: Callable[[int], Feeding]
    ) -> Drafting:
        """The network's own continuation: likeliest tokens, or drawn ones.

        Args:
            logits: [1, V] after the root.
            depth: tokens of it.
            feed: gives [1, V] logits after one more token.
        """
        tokens: list[int] = []
        laws = Laws(depth)
        while True:
            if self._sampling.greedy:
                drawn = likeliest(logits)
            else:
                vocabulary, generator = self._model.target_ids, self._generator
                assert vocabulary is not None and generator is not None  # loaded, begun to draft
                spare = vocabulary - logits.shape[1]
                law = laws.add(pad(target_probs(logits, self._sampling), (0, spare)))
                drawn = sample(law, generator)
            tokens += self._model.device.download(drawn)  # host sync
            if tokens[-1] == NO_TOKEN:
                raise NumbersError(NO_NUMBERS)
            if len(tokens) == depth:
                return Draft(TokenTree.chain(tokens), laws.rows)
            logits = yield from feed(tokens[-1])


@dataclass(slots=True)
class _Growth:
    """All nodes seen while a tree grows, and which of them are rows of the cache.

    Nodes are ranked as they come, so a pass costs what its own nodes cost. A node that was once
    below the best `budget` never comes back, as scores are final once they are known.

    Attributes:
        place: of the root in the sequence that the model sees.
        budget: nodes of the tree, at most.
        max_depth: of its nodes.
        ranked: of the best `budget` nodes, minus score and number, ascending.
        able: of these, those that may and do not yet have children; and some of before.
        root_row: of the root among the pending rows; ROOT: it is committed.
    """

    place: int
    budget: int
    max_depth: int
    nodes: list[_Candidate] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # of the rows that were fed, their rows
    positions: list[int] = field(default_factory=list)
    guessed: dict[int, int] = field(default_factory=dict)  # a node's child that was fed unseen
    ranked: list[tuple[float, int]] = field(default_factory=list)
    able: list[tuple[float, int]] = field(default_factory=list)
    root_row: int = ROOT

    def take_root(self) -> None:
        """Begin with the root's row, which is pending already."""
        self.root_row = 0
        self.parents.append(ROOT)
        self.positions.append(self.place)

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

    def likelihood(self, chosen: Sequence[int]) -> float:
        """Of these nodes, how many should be accepted."""
        return sum(math.exp(self.nodes[node].score) for node in chosen)

    def feed(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Make nodes the next pending rows.

        Returns:
            Positions of all pending rows, and the row that each continues, or ROOT.
        """
        for node in chosen:
            made = self.nodes[node]
            made.row = len(self.parents)
            at_root = made.parent == ROOT
            self.parents.append(self.root_row if at_root else self.nodes[made.parent].row)
            self.positions.append(self.place + made.depth)
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
