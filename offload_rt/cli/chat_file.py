"""Conversations in files, and texts that become part of a turn."""

import dataclasses
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_rt.cli.prompt import decode
from offload_rt.config import GenerationConfig, SamplingConfig
from offload_rt.errors import ConfigError
from offload_rt.reading import read_plain
from offload_rt.writing import replacing, writing

_KIND, _VERSION = "offload-run conversation", 1
_MOST_BYTES = 64 * 2**20
_MOST_EXCHANGES = 100_000
_KEYS = {"kind", "version", "model", "system", "settings", "turns"}
_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingConfig))
_SETTINGS: dict[str, Any] = {
    field.name: field.default
    for record in (SamplingConfig, GenerationConfig)
    for field in dataclasses.fields(record)
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """A turn and its answer."""

    turn: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What was said, and how answers are made.

    Attributes:
        model: name of the model it was held with; empty if the file does not say.
        settings: how answers are made; None if the file does not say.
        unanswered: a turn at the end that has no answer.
    """

    model: str
    system: str | None
    settings: tuple[SamplingConfig, GenerationConfig] | None
    exchanges: tuple[Exchange, ...]
    unanswered: str | None = None


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Write it, whole or not at all, readable for its owner only.

    Raises:
        ConfigError: it cannot be written, or something else is there.
    """
    _check_target(path)
    turns = []
    for exchange in conversation.exchanges:
        turns += [("user", exchange.turn), ("assistant", exchange.answer)]
    if conversation.unanswered is not None:
        turns.append(("user", conversation.unanswered))
    settings: dict[str, Any] = {}
    for record in conversation.settings or ():
        settings |= dataclasses.asdict(record)
    content = {
        "kind": _KIND,
        "version": _VERSION,
        "model": conversation.model,
        "system": conversation.system,
        "settings": settings,
        "turns": [{"role": role, "content": text} for role, text in turns],
    }
    with replacing(path, private=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_conversation(path: Path) -> Conversation:
    """Read one; a list of messages with role and content is one, too.

    Raises:
        ConfigError: it cannot be read, or is not one.
    """
    try:
        raw = json.loads(read_text(path))
    except RecursionError as error:
        raise _unusable(path, "it is nested too deep") from error
    except ValueError as error:
        raise _unusable(path, f"it is not JSON ({error})") from error
    if isinstance(raw, list):
        raw = {"kind": _KIND, "version": _VERSION, "turns": raw}
    if not isinstance(raw, dict) or raw.get("kind") != _KIND:
        raise _unusable(path, f"it does not say that it is an {_KIND!r}")
    if raw.get("version") != _VERSION:
        raise _unusable(path, f"its version is {raw.get('version')!r:.40}, known is {_VERSION}")
    if unknown := sorted(set(raw) - _KEYS):
        raise _unusable(path, f"it has {unknown[0]!r:.40}, which no conversation has")
    system, turns = _turns(path, raw.get("turns"))
    if "system" in raw and raw["system"] is not None:
        system = _text(path, raw["system"], "system")
    pairs = [Exchange(*turns[i : i + 2]) for i in range(0, len(turns) - 1, 2)]
    return Conversation(
        model=_text(path, raw.get("model", ""), "model"),
        system=system,
        settings=_settings(path, raw["settings"]) if "settings" in raw else None,
        exchanges=tuple(pairs),
        unanswered=turns[-1] if len(turns) % 2 else None,
    )


def read_text(path: Path) -> str:
    """The text of a plain file; devices and pipes, which may have no end, are refused.

    Raises:
        ConfigError: it cannot be read, is too large or not UTF-8.
    """
    return decode(read_plain(path, _MOST_BYTES), str(path))


def _check_target(path: Path) -> None:
    """Refuse to replace a file that holds something else; `replacing` sees to what is no file.

    Raises:
        ConfigError: it does.
    """
    with writing(path):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return
    if stat.S_ISREG(found.st_mode) and found.st_size:
        try:
            read_conversation(path)
        except ConfigError as error:
            raise ConfigError(
                f"{path} is there already and is no conversation: give another name"
            ) from error


def _turns(path: Path, raw: object) -> tuple[str | None, list[str]]:
    """The system prompt, if the first message is one, and the texts of the turns."""
    if not isinstance(raw, list) or len(raw) > 2 * _MOST_EXCHANGES:
        raise _unusable(path, f"'turns' must be a list of up to {2 * _MOST_EXCHANGES} messages")
    messages = [_message(path, i, message) for i, message in enumerate(raw)]
    system = None
    if messages and messages[0][0] == "system":
        system = messages.pop(0)[1]
    for i, (role, text) in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise _unusable(path, f"message {i} is of {role!r:.40}, expected is {expected!r}")
        if not text:
            raise _unusable(path, f"message {i} is empty")
    return system, [text for _, text in messages]


def _message(path: Path, index: int, raw: object) -> tuple[str, str]:
    if not isinstance(raw, dict) or set(raw) != {"role", "content"}:
        raise _unusable(path, f"message {index} must have 'role' and 'content', nothing else")
    return (
        _text(path, raw["role"], f"the role of message {index}"),
        _text(path, raw["content"], f"message {index}"),
    )


def _settings(path: Path, raw: object) -> tuple[SamplingConfig, GenerationConfig]:
    """Settings, checked as the flags are; what is not there has its default."""
    if not isinstance(raw, Mapping):
        raise _unusable(path, "'settings' must be an object")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in _SETTINGS:
            raise _unusable(path, f"'settings' has {name!r:.40}, which is none")
        values[name] = _setting(path, name, value)
    sampling = {name: value for name, value in values.items() if name in _SAMPLING}
    generation = {name: value for name, value in values.items() if name not in _SAMPLING}
    try:
        return SamplingConfig(**sampling), GenerationConfig(**generation)
    except ConfigError as error:
        raise _unusable(path, str(error)) from error


def _setting(path: Path, name: str, value: object) -> object:
    """A value of the kind that the setting has."""
    default = _SETTINGS[name]
    if isinstance(default, tuple):
        if isinstance(value, list):
            return tuple(_text(path, text, name) for text in value)
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, float):
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63:
            return float(value)
    elif value is None and default is None:
        return None
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    raise _unusable(path, f"{name!r} in 'settings' is {value!r:.40}")


def _text(path: Path, value: object, what: str) -> str:
    """A text that is Unicode."""
    if not isinstance(value, str):
        raise _unusable(path, f"{what} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _unusable(path, f"{what} has half a character at {error.start}") from error
    return value


def _unusable(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is no conversation that can be used: {why}")
