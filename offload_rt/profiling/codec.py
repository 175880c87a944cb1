"""Profiles as JSON, and every check on one that is read.

The dataclasses of `profile.py` are the schema: a field is a key, a field with a default may be
missing, anything else is refused with the key and the value it has.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from offload_rt.profiling.profile import SCHEMA_VERSION, HardwareProfile, Number, Obtained

_SHOWN_CHARACTERS = 60
_TEXT_CHARACTERS = 4096
_POSITIVE = 1e-300  # the smallest value of a measured quantity; 0 would be divided by
_PLAIN = {str: "a text", bool: "true or false"}


class MalformedError(ValueError):
    """A JSON text is no profile; the message names the key and the value."""


def encode(profile: HardwareProfile) -> str:
    """Write a profile as JSON text; fields that have their default are left out."""
    return json.dumps(_plain(profile), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def decode(text: str) -> HardwareProfile:
    """Read what `encode` wrote.

    Raises:
        MalformedError: it is not JSON, or not a profile.
    """
    try:
        tree = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"it is not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise MalformedError(f"it is {_shown(tree)}, not an object")
    version = tree.get("schema_version")
    if version is not None and (type(version) is not int or version != SCHEMA_VERSION):
        raise MalformedError(
            f"schema_version is {_shown(version)}, this program reads {SCHEMA_VERSION}"
        )
    profile = _read(HardwareProfile, tree, "", {})
    assert isinstance(profile, HardwareProfile)
    return profile


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: _plain(v) for field, v in pairs if v != field.default}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def _read(kind: Any, value: object, key: str, limits: Mapping[str, Any]) -> object:  # noqa: ANN401
    """Turn a JSON value into `kind`; `key` says where it stands."""
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, key, limits)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            _fail(key, value, "a list")
        item_kind = get_args(kind)[0]
        return tuple(_read(item_kind, v, f"{key}[{i}]", limits) for i, v in enumerate(value))
    if isinstance(kind, UnionType):
        (kind,) = [option for option in get_args(kind) if option is not NoneType]
        return None if value is None else _read(kind, value, key, limits)
    if kind in (int, float):
        return _read_number(kind, value, key, limits)
    if issubclass(kind, StrEnum):
        if value not in [str(member) for member in kind]:
            _fail(key, value, "one of " + ", ".join(kind))
        return kind(value)
    if type(value) is not kind:
        _fail(key, value, _PLAIN[kind])
    if isinstance(value, str) and (len(value) > _TEXT_CHARACTERS or not value.isprintable()):
        _fail(key, value, f"one line of at most {_TEXT_CHARACTERS} characters")
    return value


def _read_record(kind: Any, value: object, key: str, limits: Mapping[str, Any]) -> object:  # noqa: ANN401
    if not isinstance(value, dict):
        _fail(key, value, "an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise MalformedError(f"{prefix}{_shown(name)[1:-1]} is no key that a profile has")
    made: dict[str, object] = {}
    for name, field in fields.items():
        if name in value:
            inner = field.metadata or limits
            made[name] = _read(_kinds(kind)[name], value[name], prefix + name, inner)
        elif field.default is dataclasses.MISSING:
            raise MalformedError(f"{prefix}{name} is missing")
    record = kind(**made)
    if isinstance(record, Number):
        _check_number(record, key)
    return record


def _check_number(number: Number, key: str) -> None:
    if number.obtained is Obtained.MEASURED:
        if number.samples < 1 or number.spread is None:
            raise MalformedError(f"{key} is measured but lacks its spread or its samples")
    elif not number.source.strip():
        raise MalformedError(f"{key} is {number.obtained} but names no source")


def _read_number(kind: type, value: object, key: str, limits: Mapping[str, Any]) -> int | float:
    name = key.rpartition(".")[2]
    least = 0 if name == "spread" else limits["least"] if kind is int else _POSITIVE
    most = limits["most"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(key, value, "a number")
    if kind is int and not isinstance(value, int):
        _fail(key, value, "a whole number")
    if not (math.isfinite(value) if isinstance(value, float) else True):
        _fail(key, value, "finite")
    if not least <= value <= most:
        lower = "above 0" if least == _POSITIVE else f"at least {least}"
        _fail(key, value, f"{lower} and at most {most:g}")
    return kind(value)


@cache
def _kinds(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _fail(key: str, value: object, wanted: str) -> NoReturn:
    raise MalformedError(f"{key} is {_shown(value)}, must be {wanted}")


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep list
        return f"a value of type {type(value).__name__}"
    cut = len(text) > _SHOWN_CHARACTERS
    return text[: _SHOWN_CHARACTERS - 3] + "..." if cut else text


def _refuse(constant: str) -> NoReturn:
    raise MalformedError(f"it holds {constant}, which is no number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedError(f"the key {_shown(twice)} stands twice in one object")
    return found
