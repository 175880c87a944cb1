"""How likely a model finds texts: each is read once, many in a pass, and nothing of it is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from offload_rt.errors import ConfigError
from offload_rt.session.opening import Model
from offload_rt.text import require_unicode

if TYPE_CHECKING:
    import torch

    from offload_rt.engine import Engine

Text = str | Sequence[int]

# Tokens of a pass: a sweep over streamed weights serves all of them. Their hidden states are kept
# through it, 64 MiB for a model of 4096 numbers a token in bf16, twice.
MOST_TOKENS = 8192
_MOST_TEXTS = 256
_ROUND_TOKENS = 64
_LEAST_ROWS = 32  # of logits at once: 60 MiB for 152 thousand tokens, within a plan's workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely a continuation is.

    Attributes:
        logprob: sum of the log-probabilities of its tokens, computed in fp32.
        is_greedy: whether each of its tokens is the model's likeliest.
        tokens: how many it has.
    """

    logprob: float
    is_greedy: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A context and its continuation, as tokens; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def fed(self) -> list[int]:
        """What the model reads: all but the last token, after which nothing is asked."""
        return [*self.context, *self.continuation][:-1]


def is_ids(text: object) -> bool:
    """Whether it is token ids: a sequence of whole numbers, of which there is at least one."""
    return (
        isinstance(text, Sequence)
        and not isinstance(text, str | bytes | bytearray | memoryview)
        and bool(text)
        and all(isinstance(token, Integral) and not isinstance(token, bool) for token in text)
    )


def _is_empty(text: object) -> bool:
    return isinstance(text, list | tuple) and not text


def encoded_pair(model: Model, index: int, pair: tuple[Text, Text], limit: int) -> Pair:
    """A pair as tokens.

    Raises:
        ConfigError: it is none, its continuation is empty, or it is too long for the model.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ConfigError(
            f"pair {index + 1} is {pair!r:.60}, accepted is a context and a continuation"
        )
    context, continuation = pair
    if isinstance(context, str) and isinstance(continuation, str):
        for text in (context, continuation):
            require_unicode(text, f"pair {index + 1}")
        context, continuation = _encoded(model, context, continuation)
    elif isinstance(context, str) or isinstance(continuation, str):
        raise ConfigError(f"pair {index + 1} is a text and token ids: give two of one kind")
    elif wrong := [one for one in pair if not (is_ids(one) or _is_empty(one))]:
        raise ConfigError(
            f"pair {index + 1} has {wrong[0]!r:.60}, accepted are two texts or two lists of token "
            "ids"
        )
    found = Pair(tuple(map(int, context)), tuple(map(int, continuation)))
    if not found.continuation:
        if isinstance(pair[1], str) and pair[1]:
            raise ConfigError(
                f"the continuation of pair {index + 1}, {pair[1]!r:.60}, is part of the context's "
                "last token: begin it at a word"
            )
        raise ConfigError(f"the continuation of pair {index + 1} is empty: give some text")
    if not found.context:
        raise ConfigError(f"the context of pair {index + 1} has no token: give at least one")
    model.checkpoint.require_rows((*found.context, *found.continuation))
    if len(found.fed) > limit:
        raise ConfigError(
            f"pair {index + 1} has {len(found.fed) + 1} tokens, {model.name} was made for up to "
            f"{limit + 1} of them: shorten its context, or score the text in parts"
        )
    return found


def _encoded(model: Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    tokenizer = model.tokenizer
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    if not context:
        begin = tokenizer.begin_token_id
        if begin is None:
            raise ConfigError(
                f"the tokenizer of {model.name} has no token that begins a text: give a context"
            )
        return [begin], tokenizer.encode(continuation, add_special_tokens=False)
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return before, whole[len(before) :]


class Texts:
    """Pairs, and which of them are scored."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._scores: dict[Pair, Score] = {}

    @property
    def left(self) -> list[Pair]:
        """Those that are to be read, the longest first; equal ones once."""
        new = dict.fromkeys(pair for pair in self._pairs if pair not in self._scores)
        return sorted(new, key=lambda pair: -len(pair.fed))

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(len(pair.fed) for pair in self.left)

    @property
    def most_tokens(self) -> int:
        """Tokens of a pass, if memory suffices."""
        return max(self.longest, min(MOST_TOKENS, sum(len(pair.fed) for pair in self.left)))

    def room(self, most_tokens: int) -> tuple[tuple[int, ...], int]:
        """What passes of some tokens need: KV rows of each sequence, and tokens together."""
        passes = _packed(self.left, most_tokens)
        widest = max(map(len, passes))
        rows = [max(len(p[n].fed) for p in passes if n < len(p)) for n in range(widest)]
        rounded = (-(-count // _ROUND_TOKENS) * _ROUND_TOKENS for count in rows)
        return tuple(rounded), max(sum(len(pair.fed) for pair in p) for p in passes)

    def read(self, engine: "Engine", capacities: Sequence[int], most_tokens: int) -> None:
        """Score all that is left.

        Raises:
            NumbersError: what the model computes is NaN or infinite.
            Interrupted: an end is wanted; what was scored stays so.
        """
        for pairs in _packed(self.left, most_tokens, capacities):
            self._scores |= zip(pairs, _scores(engine, pairs), strict=True)

    def scores(self) -> list[Score]:
        """The scores, in the order of the pairs."""
        return [self._scores[pair] for pair in self._pairs]


def _packed(
    pairs: Sequence[Pair], most_tokens: int, capacities: Sequence[int] | None = None
) -> list[list[Pair]]:
    """Pairs in passes, in their order, which is from the longest down."""
    passes: list[list[Pair]] = []
    tokens = 0
    for pair in pairs:
        length, place = len(pair.fed), len(passes[-1]) if passes else 0
        fits = bool(passes) and tokens + length <= most_tokens
        if capacities is None:
            fits = fits and place < _MOST_TEXTS
        else:
            fits = fits and place < len(capacities) and length <= capacities[place]
        if not fits:
            passes.append([])
            tokens = 0
        passes[-1].append(pair)
        tokens += length
    return passes


def _scores(engine: "Engine", pairs: Sequence[Pair]) -> list[Score]:
    """The scores of pairs that are read in one pass."""
    import torch

    from offload_rt.engine.diagnosis import not_numbers

    texts = [pair.fed for pair in pairs]
    wanted = [range(len(pair.context) - 1, len(pair.fed)) for pair in pairs]
    hidden = engine.hidden(texts, wanted)
    targets = engine.device.upload([token for pair in pairs for token in pair.continuation])
    rows = max(_LEAST_ROWS, engine.sequences)
    parts = [
        _told(engine.logits(some), told)
        for some, told in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, greedy = (torch.cat(part) for part in zip(*parts, strict=True))
    if not bool(logprobs.isfinite().all()):  # host sync, as is what follows
        raise not_numbers(engine, lambda: engine.hidden(texts, wanted))
    sizes = [len(pair.continuation) for pair in pairs]
    return [
        Score(logprob=float(of.sum()), is_greedy=bool(best.all()), tokens=len(of))
        for of, best in zip(logprobs.split(sizes), greedy.split(sizes), strict=True)
    ]


def _told(logits: "torch.Tensor", targets: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Log-probabilities of tokens, and whether they are the likeliest."""
    rows = logits.float().log_softmax(-1)
    return rows.gather(-1, targets[:, None])[:, 0], rows.argmax(-1) == targets
