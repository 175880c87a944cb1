"""Logits to probabilities to tokens, without waiting for the device.

Nothing here reads a value back to the host, so all of it can be queued behind a pass. A row with
NaN, +inf, or nothing but -inf has no distribution: its probabilities are NaN, and what is chosen
from it is `NO_TOKEN`. So whoever reads tokens has been told, without a wait of its own.
"""

import os

import torch

from offload_rt.config import SamplingConfig

NO_TOKEN = -1  # chosen where logits are no numbers
_BLOCK = 128
_WITHIN_BLOCK = torch.arange(_BLOCK)


def target_probs(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The distribution a token is drawn from: temperature, then top-k, top-p, min-p.

    Same order and rules as the logits warpers of transformers. Ties: top-k keeps every token as
    likely as the k-th, as transformers does; top-p takes the lower id first (transformers leaves it
    to an unstable sort); temperature 0 takes the lowest id. At least one token is always kept.

    Args:
        logits: [S, V] any float type.
        config: how to warp; its seed is not used here.

    Returns:
        [S, V] fp32, each row sums to 1; one-hot when greedy.
    """
    if config.greedy:
        probs = torch.zeros_like(logits, dtype=torch.float32)
        return probs.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # Where it lies: of 120,000 ids each temporary has 0.5 MB a row, and malloc keeps their holes.
    scores = logits.to(torch.float32, copy=True)
    # Before the division: a temperature of 1e-37 must not turn the largest score into inf.
    scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(config.temperature)
    if 0 < config.top_k < scores.shape[-1]:
        kth = scores.topk(config.top_k, dim=-1).values[:, -1:]  # [S, 1]
        scores.masked_fill_(scores < kth, -torch.inf)
    probs = scores.softmax(dim=-1)
    del scores
    if config.top_p < 1.0:
        probs = _keep_top_p(probs, config.top_p)
    if config.min_p > 0.0:
        # The share of the largest one is the same before and after normalising.
        probs.masked_fill_(probs < config.min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    # A lone row would be added up by several threads, in another order than one of many.
    pair = probs.expand(2, -1) if len(probs) == 1 else probs
    return probs.div_(pair.sum(dim=-1, keepdim=True)[: len(probs)])


class Dice:
    """One random number for each place of an answer, in order; it decides what is drawn there.

    A place may be looked at many times: behind each of several drafted tokens, of which one is
    accepted, and again in the next step if it was beyond the accepted ones. The same number decides
    every time, so what is drawn is a matter of the seed and the model, not of who drafts or how
    much. Numbers of places are independent, and the accepted one was decided by those before it. So
    the distribution is that of a number drawn on the spot. (Common random numbers; for draft models
    that draw, "drafter invariance", Daliri et al., arXiv:2408.07978.)

    Args:
        generator: where numbers come from, and whatever else about an answer is random.
        device: where they are wanted; None is the generator's.
    """

    def __init__(self, generator: torch.Generator, device: torch.device | None = None) -> None:
        self.generator = generator
        device = device or generator.device
        self._numbers = torch.empty(0, dtype=torch.float64, device=device)

    def ahead(self, count: int) -> torch.Tensor:
        """Numbers of the next places: [count] fp64 in [0, 1)."""
        while len(self._numbers) < count:  # by blocks: on a GPU, how many are drawn at once matters
            more = torch.rand(
                _BLOCK,
                dtype=torch.float64,
                device=self._numbers.device,
                generator=self.generator,
            )
            self._numbers = torch.cat([self._numbers, more])
        return self._numbers[:count]

    def advance(self, count: int) -> None:
        """Go on by `count` places, the tokens of which are emitted."""
        self.ahead(count)
        self._numbers = self._numbers[count:]


def sample(probs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one token per row.

    Args:
        probs: [S, V] fp32, not necessarily normalised; a one-hot row gives exactly its token.
        generator: source of randomness, on the device of `probs`.

    Returns:
        [S] int64 token ids on the device of `probs`.
    """
    uniform = torch.rand(len(probs), dtype=torch.float64, device=probs.device, generator=generator)
    return pick(probs, uniform)


def pick(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Take one token per row by inverting the cumulative distribution.

    One fp64 number per row. In fp32 a uniform number near 1 has a grid of 6e-8, and so has its
    logarithm, so neither this method nor the usual race of probabilities against exponentials
    would give tokens below 1e-7 their share. There can be 1e5 of them, and output is to be exact.

    Args:
        probs: [S, V] fp32, not necessarily normalised; a one-hot row gives exactly its token.
        uniform: [S] fp64 in [0, 1).

    Returns:
        [S] int64 token ids on the device of `probs`; `NO_TOKEN` for rows of NaN.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)  # [S, V]
    total = cumulative[:, -1:]  # [S, 1]
    # The first entry above the point is never a token of probability zero. There is one: uniform is
    # at most 1 - 2^-53, and for every total that product rounds to less than total.
    tokens = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    return tokens.masked_fill_((total > 0).logical_not_(), NO_TOKEN).squeeze(-1)


def next_tokens(
    logits: torch.Tensor, config: SamplingConfig, uniform: torch.Tensor
) -> torch.Tensor:
    """Choose one token per row; greedy takes the argmax.

    Args:
        logits: [S, V] any float type.
        config: how to choose.
        uniform: [S] fp64 in [0, 1), on the device of `logits`; what decides in each row.

    Returns:
        [S] int64 token ids on the device of `logits`; `NO_TOKEN` for rows without a distribution.
    """
    if config.greedy:
        return likeliest(logits)
    return pick(target_probs(logits, config), uniform)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The lowest id of each row's largest logit: [S, V] gives [S]; `NO_TOKEN` if that is no number.

    On a CPU the argmax of 152,000 bf16 numbers takes 0.28 ms, so the largest of each block is
    sought first, which takes a tenth of that. Maxima take NaN for the largest of all.
    """
    vocab = logits.shape[-1]
    whole = vocab // _BLOCK * _BLOCK
    if logits.device.type != "cpu" or whole < 2 * _BLOCK:
        largest, tokens = logits.max(dim=-1)
        return _unless_finite(largest, tokens)
    tops = logits[:, :whole].view(len(logits), whole // _BLOCK, _BLOCK).amax(dim=2)
    if whole < vocab:
        tops = torch.cat([tops, logits[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    largest, starts = tops.max(dim=1, keepdim=True)
    starts *= _BLOCK
    near = starts + _WITHIN_BLOCK
    if whole < vocab:
        near.clamp_(max=vocab - 1)
    tokens = logits.gather(1, near).argmax(dim=1, keepdim=True).add_(starts)
    return _unless_finite(largest, tokens).squeeze(1)


def _unless_finite(largest: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Put `NO_TOKEN` into `tokens` where the largest logit is NaN or infinite; both are used up."""
    return tokens.masked_fill_(largest.sub_(largest).ne(0), NO_TOKEN)  # NaN - NaN, inf - inf: NaN


def make_generator(seed: int, device: torch.device | str) -> torch.Generator:
    """A generator on `device` that starts at `seed`."""
    return torch.Generator(device=device).manual_seed(seed)


def resolve_seed(seed: int | None) -> int:
    """The given seed, or one from the operating system, for the report to name."""
    if seed is not None:
        return seed
    return int.from_bytes(os.urandom(8), "little") >> 1  # below 2^63


def _keep_top_p(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of likeliest tokens with probability `top_p`; [S, V]."""
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    # fp64: the one-row scan of CUDA adds in no fixed order, which must not move the border.
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    # `before` of the first entry is exactly 0, so at least one token stays.
    dropped = torch.empty_like(probs, dtype=torch.bool).scatter_(-1, ids, before >= top_p)
    return probs.masked_fill_(dropped, 0.0)
