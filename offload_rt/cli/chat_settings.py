"""What `/set` shows and changes: how answers are made, by the names and rules of the options."""

import dataclasses
import json
from collections.abc import Collection, Iterator
from typing import Any

import click

from offload_rt.cli.chat_words import closest
from offload_rt.config import GenerationConfig, SamplingConfig
from offload_rt.errors import ConfigError
from offload_rt.session.settings import Settings, check_accept

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingConfig))
_FIELDS = (*_SAMPLING, *(field.name for field in dataclasses.fields(GenerationConfig)))
NAMES = tuple(name.replace("_", "-") for name in _FIELDS)
_SAMPLED = ("top_k", "top_p", "min_p")  # what says nothing of a greedy answer
_NONE = "none"


def show_settings(settings: Settings, names: Collection[str] = NAMES) -> str:
    """Settings, a line each."""
    values = dataclasses.asdict(settings.sampling) | dataclasses.asdict(settings.generation)
    width = max(map(len, NAMES)) + 2
    pairs = zip(NAMES, _FIELDS, strict=True)
    return "\n".join(
        f"  {name:<{width}}{_shown(values[field])}" for name, field in pairs if name in names
    )


def change_settings(
    settings: Settings, words: str, context: click.Context
) -> tuple[Settings, tuple[str, ...]]:
    """The same with other values, such as `temperature 0.7 top-p 0.9`, and the names of those.

    Args:
        settings: as they are.
        words: names and values; the value of `stop` is all that follows it.
        context: of the verb, whose options say what a value may be.

    Raises:
        ConfigError: a name is not known, or its value not accepted.
    """
    changes = dict(_pairs(words, context))
    sampling = {name: value for name, value in changes.items() if name in _SAMPLING}
    generation = {name: value for name, value in changes.items() if name not in _SAMPLING}
    changed = dataclasses.replace(
        settings,
        sampling=dataclasses.replace(settings.sampling, **sampling),
        generation=dataclasses.replace(settings.generation, **generation),
    )
    for name in _SAMPLED:
        if name in changes and changed.sampling.greedy:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"{flag} {changes[name]} has no effect on a greedy answer: "
                f"/set temperature 0.7 {flag} {changes[name]} sets both"
            )
    check_accept(changed.sampling, changed.draft)
    return changed, tuple(name.replace("_", "-") for name in changes)


def _pairs(words: str, context: click.Context) -> Iterator[tuple[str, Any]]:
    while words:
        name, _, words = words.partition(" ")
        option = _option(name, context)
        words = words.strip()
        if not words:
            raise ConfigError(f"/set {name} needs a value: /set shows what there is")
        field = str(option.name)
        if field == "stop":
            yield field, _stops(words)
            return
        value, _, words = words.partition(" ")
        words = words.strip()
        if value == _NONE and field == "seed":
            yield field, None
            continue
        try:
            yield field, option.type.convert(value, option, context)
        except click.BadParameter as error:
            raise ConfigError(f"/set {name}: {error.message}") from error
        except OverflowError as error:
            raise ConfigError(f"/set {name}: {value!r:.40} is too large") from error


def _option(name: str, context: click.Context) -> click.Option:
    """The verb's option of that name, with or without dashes."""
    plain = name.lstrip("-").replace("_", "-")
    for param in context.command.params:
        names = [text.lstrip("-") for text in param.opts]
        if isinstance(param, click.Option) and plain in names:
            if param.name in _FIELDS:
                return param
            raise ConfigError(
                f"{param.opts[-1]} is settled when a chat begins: start again to change it"
                + (", or use /system TEXT" if param.name == "system" else "")
            )
    likely = closest(plain, NAMES)
    guess = f"did you mean {likely}?" if likely else f"there are {', '.join(NAMES)}"
    raise ConfigError(f"no setting {name[:40]!r}: {guess}")


def _stops(value: str) -> tuple[str, ...]:
    """Stop strings: one as it is typed, or in JSON, where line breaks can be written."""
    if value == _NONE:
        return ()
    if value[0] not in '["':
        return (value,)
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"/set stop: {value[:40]!r} is not JSON: leave out its quotes") from error
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError('/set stop: give a text, or several as ["one", "two"]')
    return tuple(texts)


def _shown(value: object) -> str:
    if value is None or value == ():
        return _NONE
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(json.dumps, value)) if isinstance(value, tuple) else f"{value}".lower()
