"""What clients are sent: answers and pieces of them, as the OpenAI protocol has them.

`timings` is besides the protocol, with llama.cpp's names, so that what reads those reads ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offload_rt.engine.sequence import TokenLogprob

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What an answer took.

    Attributes:
        prompt_tokens: of which `reused_tokens` were in a cache.
        queue_s: until it was admitted.
        prompt_s: from there to its first token.
        answer_s: from there to its end.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    queue_s: float = 0.0
    prompt_s: float = 0.0
    answer_s: float = 0.0

    def plus(self, other: "Tally") -> "Tally":
        """Of two choices of one request; the prompt counts once."""
        return Tally(
            prompt_tokens=max(self.prompt_tokens, other.prompt_tokens),
            reused_tokens=max(self.reused_tokens, other.reused_tokens),
            answer_tokens=self.answer_tokens + other.answer_tokens,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            queue_s=max(self.queue_s, other.queue_s),
            prompt_s=max(self.prompt_s, other.prompt_s),
            answer_s=max(self.answer_s, other.answer_s),
        )

    def beside(self, other: "Tally") -> "Tally":
        """Of two prompts of one request."""
        both = self.plus(other)
        prompts = self.prompt_tokens + other.prompt_tokens
        reused = self.reused_tokens + other.reused_tokens
        fields = {name: getattr(both, name) for name in both.__slots__}
        return Tally(**fields | {"prompt_tokens": prompts, "reused_tokens": reused})

    def usage(self) -> Json:
        """The protocol's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused_tokens},
        }

    def timings(self) -> Json:
        """llama.cpp's `timings`."""
        later = self.answer_tokens - 1
        return {
            "queue_ms": 1e3 * self.queue_s,
            "cache_n": self.reused_tokens,
            "prompt_n": self.prompt_tokens - self.reused_tokens,
            "prompt_ms": 1e3 * self.prompt_s,
            "predicted_n": self.answer_tokens,
            "predicted_ms": 1e3 * self.answer_s,
            "predicted_per_second": later / self.answer_s if later > 0 and self.answer_s else None,
            "draft_n": self.drafted,
            "draft_n_accepted": self.accepted,
        }


@dataclass(frozen=True, slots=True)
class Words:
    """Token ids as texts, as far as they were asked for."""

    of: Mapping[int, str] = field(default_factory=dict)

    def chat(self, found: Sequence[TokenLogprob]) -> Json:
        """`logprobs` of a chat completion's choice."""
        return {"content": [self._entry(one) for one in found], "refusal": None}

    def _entry(self, one: TokenLogprob) -> Json:
        top = [self._pair(token, logprob) for token, logprob in one.likeliest]
        return self._pair(one.token, one.logprob) | {"top_logprobs": top}

    def _pair(self, token: int, logprob: float) -> Json:
        text = self.of[token]
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def plain(
        self, tokens: Sequence[int], found: Sequence[TokenLogprob | None], start: int = 0
    ) -> Json:
        """`logprobs` of a plain completion's choice; None is a token nothing is known of.

        Args:
            tokens: that are told of.
            found: of each.
            start: characters before the first.
        """
        texts = [self.of[token] for token in tokens]
        offsets = [start]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else one.logprob for one in found],
            "top_logprobs": [
                None if one is None else {self.of[t]: p for t, p in reversed(one.likeliest)}
                for one in found
            ],
            "text_offset": offsets[: len(texts)],
        }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all bodies of one answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool

    def _base(self, kind: str, choices: Sequence[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }

    def whole(self, choices: Sequence[Json], tally: Tally) -> Json:
        """A whole answer."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._base(kind, choices) | {"usage": tally.usage(), "timings": tally.timings()}

    def choice(self, index: int, text: str, reason: str, logprobs: Json | None) -> Json:
        """A choice of a whole answer."""
        said: Json = {"text": text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def piece(
        self,
        index: int,
        delta: Json | str,
        *,
        reason: str | None = None,
        logprobs: Json | None = None,
    ) -> Json:
        """A piece of a choice."""
        said = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return self._base("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage(self, tally: Tally) -> Json:
        """The last piece of a stream, where it was asked for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._base(kind, []) | {"usage": tally.usage()}
