"""Conversations to token ids, through the model's chat template where it has one.

A template may leave out what it is given. One made for lists of content parts writes nothing of a
plain text; others know no system turn, or read the last turn only. What a template wrote is
compared with what it was given, so nothing a user said is dropped or changed in silence.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.text.files import declared_end_ids
from offload_rt.text.tokenizer import Tokenizer

_MARKS = ("first 7391", "second 7391", "third 7391")  # no template writes that by itself
# Shorter texts may be in a template by chance: "a" is in "assistant".
_TELLING_CHARS = 24
_CLOSING = re.compile(r"</[^\s<>/]{1,40}>|\[/[A-Z_]{1,40}\]|\u25c1/\w{1,40}\u25b7")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; `role` is what the chat template knows, such as `user`.

    Attributes:
        more: other things a template may read, such as the `tool_calls` of an assistant.
    """

    role: str
    content: str
    more: Mapping[str, object] = field(default_factory=dict)


def build_prompt(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    raw: bool = False,
    tools: Sequence[Mapping[str, object]] | None = None,
    check: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Token ids of a prompt, through the model's chat template when it has one.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: a text, or a conversation whose last turn wants an answer.
        system: system prompt put in front; needs a chat template.
        raw: encode a text as it is, without the chat template.
        tools: that the chat template is to tell the model of.
        check: called with the text before tokens are made of it; may raise.

    Raises:
        ConfigError: nothing to encode, options that need a chat template without one, or a token
            without a row in the model's embedding.
        CheckpointError: the chat template or the tokenizer failed, took too long or too much
            memory, or left out a turn or a tool.
    """
    templated = not raw and tokenizer.chat_template is not None
    if not templated and (system is not None or tools or not isinstance(prompt, str)):
        what = "a system prompt" if system is not None else "tools" if tools else "a conversation"
        why = "--raw leaves it out" if raw else "the model has none"
        raise ConfigError(f"{what} needs a chat template and {why}: give one plain text")
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if not turns or not turns[-1].content:
        raise ConfigError("the prompt is empty: give some text")
    if system is not None:
        if turns[0].role == "system":
            raise ConfigError("two system prompts: leave out --system or the system message")
        # A byte order mark comes along with "$(cat FILE)".
        turns.insert(0, Message(role="system", content=system.removeprefix("\ufeff")))
    for turn in turns:
        require_unicode(turn.content, "the prompt")
    text = _rendered(tokenizer, turns, tools) if templated else turns[0].content
    check(text)
    # The template has written the special tokens already.
    ids = tokenizer.encode(text, add_special_tokens=not templated)
    if not ids:
        raise ConfigError(f"the prompt of {len(text)} characters gives no token: give other text")
    return ids


def end_token_ids(tokenizer: Tokenizer, folder: Path) -> frozenset[int]:
    """Tokens that end an answer: those the folder's files declare, else the tokenizer's own.

    Where only the tokenizer names one, `<|endoftext|>` is one too if it is a special token: such
    tokenizers of Qwen name the end of a turn, and plain text goes on for ever.

    Raises:
        CheckpointError: a file is damaged or names something that is not a token id.
    """
    declared = declared_end_ids(folder)
    if declared is not None:
        return declared
    own = tokenizer.eos_token_id
    ids = set() if own is None else {own}
    text_end = tokenizer.special_tokens.get("<|endoftext|>")
    return frozenset(ids if text_end is None else {*ids, text_end})


def answer_end_token(
    tokenizer: Tokenizer, end_tokens: Collection[int], *, raw: bool = False
) -> int | None:
    """The token behind an answer in a text the model was trained on.

    It is what the chat template writes there: Gemma and Phi-3 end a turn with another token than
    the tokenizer's own end of a text.

    Args:
        tokenizer: from `load_tokenizer`.
        end_tokens: all tokens that end an answer (`end_token_ids`).
        raw: texts are given without the chat template.

    Returns:
        The tokenizer's own where no template tells; None if there is no end token at all.
    """
    own = tokenizer.eos_token_id
    fallback = min(end_tokens, default=None) if own is None else own
    if raw or tokenizer.chat_template is None:
        return fallback
    turns = zip(("user", "assistant", "user"), _MARKS, strict=True)
    try:
        text = _rendered(tokenizer, [Message(role=role, content=mark) for role, mark in turns])
    except CheckpointError:
        return fallback  # a template for other roles
    behind = text.rpartition(_MARKS[1])[2].partition(_MARKS[2])[0]
    ids = tokenizer.encode(behind, add_special_tokens=False)
    return next((token for token in ids if token in end_tokens), fallback)


def template_ids(tokenizer: Tokenizer, *, raw: bool = False) -> frozenset[int]:
    """Tokens that every prompt has, as the chat template writes them around some plain words."""
    if raw or tokenizer.chat_template is None:
        return frozenset()
    try:
        return frozenset(build_prompt(tokenizer, _MARKS[0]))
    except CheckpointError:
        return frozenset()  # a template for other words


def require_unicode(text: str, what: str) -> None:
    """Refuse a text with halves of characters, which no tokenizer takes.

    Raises:
        ConfigError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} is not UTF-8 at character {error.start}: convert it first"
        ) from error


def _rendered(
    tokenizer: Tokenizer,
    turns: Sequence[Message],
    tools: Sequence[Mapping[str, object]] | None = None,
) -> str:
    """What the chat template writes, with every turn in it: given texts, else content parts.

    Raises:
        CheckpointError: it fails, or leaves out or changes a turn, both ways.
    """
    advice = "leave out --system or use --raw" if turns[0].role == "system" else "use --raw"
    advice = "leave the tools out" if tools else advice
    failure: CheckpointError | None = None
    for parts in (False, True):
        try:
            text = _render(tokenizer, turns, parts, tools)
            lost = _lost_turn(tokenizer, turns, text, parts)
            _check_tools(tokenizer, text, tools)
        except CheckpointError as error:
            failure = failure or CheckpointError(f"{error}; {advice}")
            if not error.__cause__ or not getattr(error.__cause__, "raised", False):
                break  # it exceeded a limit, and would again
            continue
        if lost is None:
            return text
        failure = failure or _loss(tokenizer, turns, lost)
    assert failure is not None
    raise failure


def _render(
    tokenizer: Tokenizer,
    turns: Sequence[Message],
    parts: bool,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> str:
    messages: list[dict[str, object]] = [
        {**turn.more, "role": turn.role, "content": [_part(turn)] if parts else turn.content}
        for turn in turns
    ]
    chars = sum(len(turn.content) for turn in turns)
    chars += sum(len(json.dumps(more)) for more in (*(t.more for t in turns), tools) if more)
    return tokenizer.render(messages, chars, tools)


def _check_tools(
    tokenizer: Tokenizer, text: str, tools: Sequence[Mapping[str, object]] | None
) -> None:
    """See that a template wrote the names of all tools.

    Raises:
        CheckpointError: it left one out.
    """
    for tool in tools or ():
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise CheckpointError(
                f"the chat template of {tokenizer.folder} leaves out tool {name!r:.60}: it knows "
                "no tools"
            )


def _lost_turn(
    tokenizer: Tokenizer, turns: Sequence[Message], text: str, parts: bool
) -> int | None:
    """The first turn that is not in a rendered text; None if all are.

    Templates trim turns, and leave out what an assistant thought in earlier ones. A short text may
    be there by chance, so it is also tried whether a mark in its place would be.
    """
    marks = {}
    for index, turn in enumerate(turns):
        kept = [len(words) for words in _kept_words(turn) if _holds(text, words)]
        if not kept or (parts and _holds(text, repr(_part(turn)))):  # or written out as Python does
            return index
        if max(kept) < _TELLING_CHARS and turn.content.strip():
            marks[index] = f"mark {index} 7391"
    if not marks:
        return None
    marked = [
        Message(role=turn.role, content=marks.get(i, turn.content)) for i, turn in enumerate(turns)
    ]
    try:
        with_marks = _render(tokenizer, marked, parts)
    except CheckpointError:
        return None  # a template that asks for certain texts; these were there
    return next((i for i, mark in marks.items() if mark not in with_marks), None)


def _part(turn: Message) -> dict[str, str]:
    return {"type": "text", "text": turn.content}


def _holds(text: str, words: str) -> bool:
    """Whether words are in a text, as they are or as JSON writes them."""
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _kept_words(turn: Message) -> list[str]:
    """What a template must keep of a turn: all of it, or of an assistant what follows thinking."""
    whole = turn.content.strip()
    if turn.role != "assistant":
        return [whole]
    return [whole, *(whole[end.end() :].strip() for end in [*_CLOSING.finditer(whole)][-1:])]


def _loss(tokenizer: Tokenizer, turns: Sequence[Message], lost: int) -> CheckpointError:
    source = f"the chat template of {tokenizer.folder}"
    if turns[lost].role == "system":
        return CheckpointError(
            f"{source} leaves out or changes the system prompt: leave out --system or use --raw"
        )
    which = "the prompt" if len(turns) - (turns[0].role == "system") == 1 else f"turn {lost + 1}"
    of = "" if which == "the prompt" else f" of {len(turns)} ({turns[lost].role})"
    return CheckpointError(f"{source} leaves out or changes {which}{of}: use --raw with one text")
