"""A file to train on: prompts as in `prompt_set`, or conversations, one in each line."""

import json
from collections.abc import Sequence
from typing import Any

from offload_rt.cli.prompt_set import decode_line, parse_object, read_item, read_lines
from offload_rt.errors import ConfigError
from offload_rt.training.talks import ASSISTANT, SYSTEM, USER, Talk

_ROLES = {
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "system": SYSTEM,
}
_KINDS = (("messages", "role", "content"), ("conversations", "from", "value"))


def read_talks(path: str) -> list[Talk]:
    """Read all prompts or conversations of a file; blank lines are left out.

    Conversations are JSON lines with `messages` (`role`, `content`) or, as in ShareGPT,
    `conversations` (`from`, `value`).

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is not what it should be.
    """
    lines = read_lines(path)
    if not lines:
        raise ConfigError(
            f"{path} is empty: give a file with a prompt or conversation in each line"
        )
    number, first = lines[0]
    if _is_list(first):
        raise ConfigError(
            f"{path}, line {number} begins a JSON list, which is not read: write one object in "
            "each line"
        )
    if not first.startswith(b"{"):
        return [_prompt(decode_line(line, path, number), number) for number, line in lines]
    return [_talk(parse_object(line, path, number), path, number) for number, line in lines]


def require_answers(talks: Sequence[Talk], path: str) -> None:
    """Refuse prompts alone, where nobody answers them.

    Raises:
        ConfigError: a line has no answer.
    """
    for talk in talks:
        if not talk.answered:
            raise ConfigError(
                f"{path}, line {talk.line} has a prompt but no answer: add --self-distill to have "
                "the model answer, or give conversations"
            )


def _is_list(line: bytes) -> bool:
    if line == b"[":
        return True
    try:
        return line.startswith(b"[") and isinstance(json.loads(line.rstrip(b",")), list)
    except (ValueError, RecursionError):
        return False


def _prompt(text: str, number: int) -> Talk:
    return Talk(line=number, turns=((USER, text),))


def _talk(record: dict[str, Any], path: str, number: int) -> Talk:
    for key, role_key, text_key in _KINDS:
        if key in record:
            turns = _turns(record[key], role_key, text_key, f"{path}, line {number}: {key}")
            return Talk(line=number, turns=turns)
    return _prompt(read_item(record, path, number).text, number)


def _turns(found: object, role_key: str, text_key: str, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{where} is not a list of turns")
    turns = []
    for place, turn in enumerate(found, start=1):
        role = turn.get(role_key) if isinstance(turn, dict) else None
        text = turn.get(text_key) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise ConfigError(
                f"{where}, turn {place} needs {role_key!r}, one of {', '.join(_ROLES)}, and "
                f"{text_key!r}, a text"
            )
        turns.append((_ROLES[role], text))
    _check_order(turns, where)
    return tuple(turns)


def _is_unicode(text: str) -> bool:
    """JSON may escape half of a character of two; no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_order(turns: Sequence[tuple[str, str]], where: str) -> None:
    """An answer needs a question before it, and a question needs words."""
    previous = ""
    for place, (role, text) in enumerate(turns, start=1):
        if role == ASSISTANT and previous != USER:
            raise ConfigError(
                f"{where}, turn {place} answers nothing: the turn before is no user's"
            )
        if role == USER and not text.strip():
            raise ConfigError(f"{where}, turn {place} is empty")
        if not _is_unicode(text):
            raise ConfigError(f"{where}, turn {place} holds half a character, which is no text")
        previous = role
    if USER not in {role for role, _ in turns}:
        raise ConfigError(f"{where} has no turn of a user")
