"""Texts to train on: which of their tokens are answers, which places are trained, their labels.

A place is a token whose hidden state heads are fed: one that made a token of an answer. The state
of token i makes token i + 1, and head k (from 0) guesses token i + 2 + k. So the places of an
answer begin with the token before it, and no label lies beyond its end: there the model stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload_rt.errors import ConfigError, OffloadError
from offload_rt.text import Message, Tokenizer, build_prompt
from offload_rt.training.talks import ASSISTANT, Talk

NO_LABEL = -100  # what torch's losses leave out


@dataclass(frozen=True, slots=True)
class Sample:
    """A text as tokens.

    Attributes:
        ids: its tokens.
        answers: first token of each answer and the one past its end; the first is not token 0.
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]

    @property
    def places(self) -> list[int]:
        """Tokens whose hidden states made the answers."""
        return [at for start, stop in self.answers for at in range(start - 1, stop - 1)]

    @property
    def trains(self) -> bool:
        """Whether there is a label at any place."""
        return any(stop - start >= 2 for start, stop in self.answers)

    def labels(self, heads: int) -> torch.Tensor:
        """[places, K] int64 token that each head should guess, `NO_LABEL` past an answer's end."""
        rows = [
            [self.ids[at + 2 + k] if at + 2 + k < stop else NO_LABEL for k in range(heads)]
            for start, stop in self.answers
            for at in range(start - 1, stop - 1)
        ]
        return torch.tensor(rows, dtype=torch.int64).view(-1, heads)

    def cut(self, tokens: int) -> "Sample":
        """Its beginning."""
        answers = tuple((a, min(b, tokens)) for a, b in self.answers if a < tokens)
        return Sample(self.ids[:tokens], answers)


@dataclass(slots=True)
class Dropped:
    """What could not be used, and why.

    Attributes:
        long: prompts that leave no room for an answer.
        empty: texts without a place to train at.
        cut: texts that were cut to the context.
    """

    long: int = 0
    empty: int = 0
    cut: int = 0

    def __str__(self) -> str:
        parts = [
            (self.long, "left out, the prompt fills the context"),
            (self.empty, "left out, the answer has fewer than 2 tokens"),
            (self.cut, "cut to the context"),
        ]
        return "; ".join(f"{count} {what}" for count, what in parts if count)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns talks into tokens as a run of the model would see them.

    Attributes:
        tokenizer: the model's.
        end_token: what ends an answer.
        context_tokens: the longest text.
        raw: prompts are given as they are.
        dropped: counts what was not used.
    """

    tokenizer: Tokenizer
    end_token: int
    context_tokens: int
    raw: bool
    dropped: Dropped

    def prompts(self, talks: Sequence[Talk]) -> list[tuple[int, ...]]:
        """Tokens of the prompts; those that leave no room for an answer are left out."""
        found = []
        for talk in talks:
            ids = self._prompt(talk, talk.prompt)
            if len(ids) + 2 > self.context_tokens:
                self.dropped.long += 1
            else:
                found.append(tuple(ids))
        return found

    def samples(self, talks: Sequence[Talk]) -> list[Sample]:
        """Conversations with the answers they have.

        Raises:
            ConfigError: the model has no chat template for several turns.
        """
        found = [sample for talk in talks for sample in self._samples(talk)]
        return self.usable(found)

    def usable(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those with something to learn, cut to the context."""
        found = []
        for sample in samples:
            kept = sample.cut(self.context_tokens)
            if not kept.trains:
                too_long = sample.trains
                self.dropped.long += too_long
                self.dropped.empty += not too_long
                continue
            self.dropped.cut += len(sample.ids) > self.context_tokens
            found.append(kept)
        return found

    def _samples(self, talk: Talk) -> list[Sample]:
        """A talk as one text, or several where a template writes earlier turns in another way."""
        done: list[Sample] = []
        ids: tuple[int, ...] = ()
        answers: tuple[tuple[int, int], ...] = ()
        for index, (role, text) in enumerate(talk.turns):
            if role != ASSISTANT:
                continue
            prompt = tuple(self._prompt(talk, talk.turns[:index]))
            if prompt[: len(ids)] != ids:
                done.append(Sample(ids, answers))
                answers = ()
            answer = self.tokenizer.encode(text, add_special_tokens=False)
            ids = (*prompt, *answer, self.end_token)
            answers = (*answers, (len(prompt), len(ids)))
        return [*done, Sample(ids, answers)]

    def _prompt(self, talk: Talk, turns: Sequence[tuple[str, str]]) -> list[int]:
        messages = [Message(role=role, content=text) for role, text in turns]
        only_text = len(messages) == 1 and messages[0].role == "user"
        prompt = messages[0].content if only_text else messages
        try:
            return build_prompt(self.tokenizer, prompt, raw=self.raw)
        except OffloadError as error:  # a template may want roles in another order
            raise ConfigError(f"line {talk.line} of the data: {error}") from error


def pack(samples: Sequence[Sample], pass_tokens: int) -> list[range]:
    """Consecutive samples that are read in one pass: up to `pass_tokens`, or one longer one."""
    batches, start, tokens = [], 0, 0
    for index, sample in enumerate(samples):
        if index > start and tokens + len(sample.ids) > pass_tokens:
            batches.append(range(start, index))
            start, tokens = index, 0
        tokens += len(sample.ids)
    if samples:
        batches.append(range(start, len(samples)))
    return batches


def require_samples(samples: Sequence[Sample], what: str, dropped: Dropped) -> None:
    """Refuse to go on with nothing.

    Raises:
        ConfigError: there are no samples.
    """
    if not samples:
        raise ConfigError(
            f"nothing is left to {what} ({dropped or 'no texts'}): give longer answers or more "
            "prompts, or raise --context"
        )
