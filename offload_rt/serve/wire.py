"""What clients send, read strictly: the OpenAI protocol, as far as it is done here.

Fields that are not known are left alone. A field of the protocol that is not done here is refused
if its value would change the answer, so nobody gets another answer than he asked for.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload_rt.errors import OffloadError

MOST_CHOICES = 16
MOST_PROMPTS = 256
MOST_STOPS, MOST_STOP_CHARS = 4, 200
MOST_TOP = 20
_MOST_TURNS, _MOST_TOOLS, _MOST_TOKENS = 4096, 128, 2**31

BodyT = TypeVar("BodyT", bound="Body")


class WireError(OffloadError):
    """A request that is answered with an error, in the protocol's words.

    Attributes:
        status: of HTTP.
        kind: the protocol's `type`.
        param: the field that is wrong.
        code: the protocol's `code`.
        retry_s: after how long to try again; None: it would fail again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_s = retry_s

    def body(self) -> dict[str, Any]:
        """As it goes over the wire."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class Body(BaseModel):
    """The body of a request; numbers are numbers, not texts, and finite."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool | None = None


class Drawn(Body):
    """What chat and plain completions have in common."""

    model: str | None = Field(None, max_length=1000)
    max_tokens: int | None = Field(None, ge=0, le=_MOST_TOKENS)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, le=_MOST_TOKENS)
    min_p: float | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: Any = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    draft_tokens: int | None = Field(None, ge=0, le=1024)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            WireError: they are none, too many or too long.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is None:
            return ()
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise WireError("stop is a text that is not empty, or a list of those", param="stop")
        if len(stops) > MOST_STOPS or max(map(len, stops), default=0) > MOST_STOP_CHARS:
            raise WireError(
                f"stop has {len(stops)} texts, accepted are up to {MOST_STOPS} of up to "
                f"{MOST_STOP_CHARS} characters",
                param="stop",
            )
        return tuple(stops)


class Turn(Body):
    """A turn of a conversation."""

    role: str = Field(max_length=64)
    content: Any = None

    def text(self, place: int) -> str:
        """Its content as one text.

        Raises:
            WireError: it is no text.
        """
        param = f"messages.{place}.content"
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        parts = []
        for part in self.content if isinstance(self.content, list) else [None]:
            match part:
                case {"type": "text", "text": str(text)}:
                    parts.append(text)
                case _:
                    raise WireError(
                        "the content of a message is a text, or a list of parts of type text; this "
                        "server reads no images, files or sound",
                        param=param,
                    )
        return "\n".join(parts)

    def more(self) -> dict[str, Any]:
        """What else a chat template may read of it."""
        known = ("name", "tool_calls", "tool_call_id", "reasoning_content")
        extra = self.model_extra or {}
        return {name: extra[name] for name in known if extra.get(name) is not None}


class ChatBody(Drawn):
    """The body of /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1, max_length=_MOST_TURNS)
    max_completion_tokens: int | None = Field(None, ge=0, le=_MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    tools: list[dict[str, Any]] | None = Field(None, max_length=_MOST_TOOLS)
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None

    def top(self) -> int | None:
        """Likeliest tokens to tell of beside each; None: no log-probabilities at all.

        Raises:
            WireError: top_logprobs without logprobs.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise WireError("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def asked_tokens(self) -> int | None:
        """Most tokens of the answer, by either name."""
        found = self.max_completion_tokens
        return self.max_tokens if found is None else found

    def told_tools(self) -> list[dict[str, Any]] | None:
        """Tools that the chat template is to tell of.

        Raises:
            WireError: one is to be called whatever the model wants.
        """
        if self.tool_choice not in (None, "auto", "none"):
            raise WireError(
                "tool_choice may be auto or none: a call cannot be forced here, as answers are not "
                "constrained",
                param="tool_choice",
            )
        return None if self.tool_choice == "none" or not self.tools else self.tools

    def check(self) -> None:
        """Refuse what is not done here and would change the answer.

        Raises:
            WireError: it is asked for.
        """
        kind = (self.response_format or {}).get("type", "text")
        if kind != "text":
            raise WireError(
                "response_format: answers are not constrained to a format here; leave it out and "
                "ask for the format in the prompt",
                param="response_format",
            )
        _check_rest(self, {"functions", "function_call", "audio", "web_search_options"})
        if (self.model_extra or {}).get("modalities", ["text"]) != ["text"]:
            raise WireError("modalities: answers are text", param="modalities")


class CompletionBody(Drawn):
    """The body of /v1/completions."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids.

        Raises:
            WireError: it is none of these, or too many.
        """
        given = self.prompt
        if isinstance(given, str) or _is_ids(given):
            given = [given]
        if not isinstance(given, list) or not given:
            raise WireError("prompt is a text, a list of texts, or token ids", param="prompt")
        if len(given) > MOST_PROMPTS:
            raise WireError(
                f"prompt has {len(given)} texts, accepted are up to {MOST_PROMPTS}", param="prompt"
            )
        if any(not (isinstance(one, str) or _is_ids(one)) or not one for one in given):
            raise WireError(
                "prompt is a text that is not empty, a list of those, or token ids", param="prompt"
            )
        for one in given:
            if not isinstance(one, str):
                check_tokens(one, "prompt")
        return given

    def check(self) -> None:
        """Refuse what is not done here and would change the answer.

        Raises:
            WireError: it is asked for.
        """
        _check_rest(self, {"suffix"})
        best = (self.model_extra or {}).get("best_of")
        if best not in (None, 1) and best != (self.n or 1):
            raise WireError("best_of may be as many as n", param="best_of")


class TokenizeBody(Body):
    """The body of /tokenize: `prompt` or `content` is a text, `messages` a conversation."""

    prompt: str | None = None
    content: str | None = None
    messages: list[Turn] | None = Field(None, min_length=1, max_length=_MOST_TURNS)
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """The body of /detokenize."""

    tokens: list[int] = Field(max_length=2**20)


def read_body(kind: type[BodyT], raw: bytes) -> BodyT:
    """A request's body.

    Raises:
        WireError: it is not JSON, or a field is not what it may be; the input is not repeated.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"][:4])
        if first["type"] == "json_invalid":
            raise WireError("the body is not JSON, or no object") from None
        what = f"{place}: {first['msg']}" if place else f"the body: {first['msg']}"
        raise WireError(f"{what[:300]}", param=place or None) from None


def check_tokens(tokens: Sequence[int], param: str) -> None:
    """Refuse numbers that no tokenizer takes for tokens.

    Raises:
        WireError: there is one.
    """
    if min(tokens, default=0) < 0 or max(tokens, default=0) >= _MOST_TOKENS:
        raise WireError("a token is below 0 or above 2^31", param=param)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


# Of the protocol or of other servers; they constrain or change an answer.
_NOT_DONE = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("grammar", "json_schema", "min_tokens", "chat_template", "chat_template_kwargs"),
    *("continue_final_message", "logits_processors", "use_beam_search", "prompt_embeds"),
)


def _check_rest(body: Drawn, names: set[str]) -> None:
    """Refuse fields that are not done here, unless they ask for nothing."""
    penalties = {
        "presence_penalty": body.presence_penalty or 0,
        "frequency_penalty": body.frequency_penalty or 0,
        "repetition_penalty": (body.repetition_penalty or 1) - 1,
    }
    for name, value in penalties.items():
        if value:
            raise WireError(f"{name}: drafts are checked without regard to it", param=name)
    if body.logit_bias:
        raise WireError("logit_bias: drafts are checked without regard to it", param="logit_bias")
    extra = body.model_extra or {}
    for name in (*sorted(names), *_NOT_DONE):
        if extra.get(name):
            raise WireError(f"{name}: not done by this server, leave it out", param=name)
