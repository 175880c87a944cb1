"""What clients send, as requests of the engine: the server and the batch verb make them here."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offload_rt.config import SEEDS, SamplingConfig
from offload_rt.engine.sequence import Request
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.sampling import resolve_seed
from offload_rt.serve.bodies import Json
from offload_rt.serve.wire import ChatBody, Drawn, Turn, WireError
from offload_rt.text import Message, Tokenizer, build_prompt

PLAIN_TOKENS = 16  # of a plain completion that does not say, as in the protocol
_USUAL_CHARS = 8  # of a token, at most: texts with no more are let through without a look


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a server answers with, and how.

    Attributes:
        names: under which clients may ask for the model, the first is told.
        sampling: where a request does not say.
        max_tokens: of a chat answer, likewise.
        context_tokens: of prompt and answer, at most.
        kv_tokens: of all that are answered at once.
        sequences: that are answered at once.
        queue: further ones that may wait.
        ping_s: between comments that keep a connection alive.
        version: of this program.
        plan: what lives where, for whoever looks at the page.
        memory: bytes of what lives where.
        logs_prompts: whether the log has them.
    """

    names: tuple[str, ...]
    sampling: SamplingConfig
    max_tokens: int
    context_tokens: int
    kv_tokens: int
    sequences: int
    queue: int = 64
    ping_s: float = 15.0
    version: str = ""
    plan: Json = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    logs_prompts: bool = False


@dataclass(slots=True)
class Maker:
    """Makes requests of the engine of what clients send.

    Args:
        offer: says what a request leaves open.
        prompts: makes tokens of texts.
        end_tokens: that end an answer.
    """

    offer: Offer
    prompts: Tokenizer
    end_tokens: frozenset[int]
    _longest: int = 0  # characters of a token, once they are looked up

    def check_model(self, name: str | None) -> None:
        """See that the model asked for is this one.

        Raises:
            WireError: it is another.
        """
        if name is not None and name not in self.offer.names:
            raise WireError(
                f"model {name!r:.100} is not here: there is {', '.join(self.offer.names)}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def chat_ids(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> list[int]:
        """Token ids of a conversation; one that is too long is refused before it is read.

        Args:
            turns: of it.
            tools: that the chat template is told of.

        Raises:
            WireError: it is none or too long, or the chat template refuses it.
        """
        messages = [
            Message(role=turn.role, content=turn.text(place), more=turn.more())
            for place, turn in enumerate(turns)
        ]
        told = [
            one for one in messages if one.role != "assistant"
        ]  # of theirs a part may be left out

        def make() -> list[int]:
            self._check_length(sum(len(one.content.strip()) for one in told), "messages")
            # What the template wrote of all turns is looked at again.
            return build_prompt(
                self.prompts,
                messages,
                tools=tools,
                check=lambda text: self._check_length(len(text.strip()), "messages"),
            )

        return self._tokens(make, "messages")

    def plain_ids(self, prompt: str, special: bool = True) -> list[int]:
        """Token ids of a text, as it is; one that is too long is refused before it is read.

        Args:
            prompt: the text.
            special: with tokens that begin a text.

        Raises:
            WireError: it is too long, or the tokenizer refuses it.
        """

        def make() -> list[int]:
            self._check_length(len(prompt.strip()), "prompt")
            return self.prompts.encode(prompt, add_special_tokens=special)

        return self._tokens(make, "prompt")

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens.

        Raises:
            WireError: they are too many, or none of this model.
        """
        if len(tokens) > (most := self.offer.context_tokens):
            raise WireError(
                f"tokens has {len(tokens)}, accepted are {most} (--context): send parts of them",
                param="tokens",
            )
        try:
            return self.prompts.decode(tokens)
        except OffloadError as error:
            raise WireError("these tokens cannot be decoded", param="tokens") from error

    def _check_length(self, chars: int, param: str) -> None:
        """Refuse a text that is too long however its tokens are: to find them takes seconds.

        Raises:
            WireError: it is.
            OffloadError: the tokenizer does not tell its tokens.
        """
        room = min(self.offer.context_tokens, self.offer.kv_tokens)
        if chars <= _USUAL_CHARS * room:
            return
        self._longest = self._longest or max(map(len, self.prompts.get_vocab()))
        if chars > self._longest * room:
            raise WireError(
                f"the prompt has {chars} characters, a token has {self._longest} at most, there is "
                f"room for {room} tokens with the answer (--context and --kv-tokens): shorten the "
                "prompt",
                code="context_length_exceeded",
                param=param,
            )

    def _tokens(self, make: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return make()
        except WireError:
            raise
        except OffloadError as error:  # a template that refuses these turns is no fault of ours
            said = str(error).replace(str(self.prompts.folder), self.offer.names[0])
            raise WireError(said, param=param) from error

    def request(
        self, body: Drawn, ids: Sequence[int], asked: int | None, usual: int, top: int | None
    ) -> Request:
        """What is wanted of the engine; of the first choice.

        Args:
            body: of the request.
            ids: the prompt.
            asked: tokens of the answer, at most; None: `usual`.
            usual: where the request does not say.
            top: likeliest tokens to tell of; None: no log-probabilities.

        Raises:
            WireError: a value is out of range, or the prompt is too long.
        """
        limit = min(self.offer.context_tokens, self.offer.kv_tokens)
        if len(ids) + (asked != 0) > limit:
            raise WireError(
                f"the prompt has {len(ids)} tokens, there is room for {limit} with the answer "
                "(--context and --kv-tokens): shorten the prompt",
                code="context_length_exceeded",
                param="messages" if isinstance(body, ChatBody) else "prompt",
            )
        sampling = self._sampling(body)
        seed = sampling.seed if sampling.seed is not None else resolve_seed(None)
        return Request(
            ids=ids,
            sampling=sampling,
            seed=seed,
            max_tokens=min(usual if asked is None else asked, limit - len(ids)),
            end_tokens=frozenset() if body.ignore_eos else self.end_tokens,
            logprobs=top,
            draft_tokens=body.draft_tokens,
        )

    def _sampling(self, body: Drawn) -> SamplingConfig:
        names = ("temperature", "top_k", "top_p", "min_p")
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        if given.get("top_k") == -1:  # as vLLM writes it
            given["top_k"] = 0
        seed = self.offer.sampling.seed if body.seed is None else body.seed % SEEDS
        try:
            found = replace(self.offer.sampling, **given, seed=seed)
        except ConfigError as error:
            said = re.sub(r"--([a-z-]+)", lambda match: match[1].replace("-", "_"), str(error))
            raise WireError(said, param=said.partition(" ")[0]) from error
        return SamplingConfig(seed=seed) if found.greedy else found


def several(request: Request, count: int) -> list[Request]:
    """As many choices, each with a seed of its own."""
    return [replace(request, seed=(request.seed + i) % SEEDS) for i in range(count)]
