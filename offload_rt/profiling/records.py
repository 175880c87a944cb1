"""Dataclasses as JSON, and every check on JSON that is read.

The dataclass is the schema: a field is a key, a field with a default may be missing, anything else
is refused with the key and the value it has. Numbers are checked against the bounds in the field's
metadata; those of an outer field hold for the records in it that state none.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from offload_rt.profiling.profile import Number, Obtained

_SHOWN_CHARACTERS = 60
_TEXT_CHARACTERS = 4096
_POSITIVE = 1e-300  # the smallest value of a measured quantity; 0 would be divided by
_PLAIN = {str: "a text", bool: "true or false"}


class MalformedError(ValueError):
    """A JSON text is not the record it should be; the message names the key and the value."""


def to_json(record: object) -> str:
    """Write a record as JSON text; fields that have their default are left out."""
    return json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_object(text: str) -> dict[str, object]:
    """Read JSON text that must be one object, with every key once and no NaN.

    Raises:
        MalformedError: it is something else.
    """
    try:
        tree = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"it is not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise MalformedError(f"it is {shown_json(tree)}, not an object")
    return tree


def check_version(tree: Mapping[str, object], known: int) -> None:
    """See that `schema_version`, if it is there, is the one this program reads.

    Raises:
        MalformedError: it is another.
    """
    version = tree.get("schema_version")
    if version is not None and (type(version) is not int or version != known):
        raise MalformedError(f"schema_version is {shown_json(version)}, this program reads {known}")


def shown_json(value: object) -> str:
    """A JSON value as a short text."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep list
        return f"a value of type {type(value).__name__}"
    cut = len(text) > _SHOWN_CHARACTERS
    return text[: _SHOWN_CHARACTERS - 3] + "..." if cut else text


@dataclasses.dataclass(frozen=True, slots=True)
class RecordReader:
    """Turns parsed JSON into a record.

    Attributes:
        noun: what the record is, in messages: "a profile".
    """

    noun: str

    def read(self, kind: Any, value: object, key: str = "") -> Any:  # noqa: ANN401
        """Turn a JSON value into `kind`; `key` is its place in the file.

        Raises:
            MalformedError: a key is missing, unknown, or has a value it cannot have.
        """
        return self._read(kind, value, key, {})

    def _read(self, kind: Any, value: object, key: str, limits: Mapping[str, Any]) -> object:  # noqa: ANN401
        if dataclasses.is_dataclass(kind):
            return self._read_record(kind, value, key, limits)
        if get_origin(kind) is tuple:
            if not isinstance(value, list):
                _fail(key, value, "a list")
            item = get_args(kind)[0]
            return tuple(self._read(item, v, f"{key}[{i}]", limits) for i, v in enumerate(value))
        if isinstance(kind, UnionType):
            (kind,) = [option for option in get_args(kind) if option is not NoneType]
            return None if value is None else self._read(kind, value, key, limits)
        if kind in (int, float):
            return _read_number(kind, value, key, limits)
        return _read_text(kind, value, key)

    def _read_record(
        self,
        kind: Any,  # noqa: ANN401
        value: object,
        key: str,
        limits: Mapping[str, Any],
    ) -> object:
        if not isinstance(value, dict):
            _fail(key, value, "an object")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in fields:
                unknown = prefix + shown_json(name)[1:-1]
                raise MalformedError(f"{unknown} is no key that {self.noun} has")
        made: dict[str, object] = {}
        for name, field in fields.items():
            if name in value:
                inner = field.metadata or limits
                made[name] = self._read(_kinds(kind)[name], value[name], prefix + name, inner)
            elif field.default is dataclasses.MISSING:
                raise MalformedError(f"{prefix}{name} is missing")
        record = kind(**made)
        if isinstance(record, Number):
            _check_number(record, key)
        return record


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: _plain(v) for field, v in pairs if v != field.default}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def _check_number(number: Number, key: str) -> None:
    if number.obtained is Obtained.MEASURED:
        if number.samples < 1 or number.spread is None:
            raise MalformedError(f"{key} is measured but lacks its spread or its samples")
    elif not number.source.strip():
        raise MalformedError(f"{key} is {number.obtained} but names no source")


def _read_number(kind: type, value: object, key: str, limits: Mapping[str, Any]) -> int | float:
    name = key.rpartition(".")[2]
    may_be_zero = name == "spread" or limits.get("zero", False)
    least = limits["least"] if kind is int else 0 if may_be_zero else _POSITIVE
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


def _read_text(kind: Any, value: object, key: str) -> object:  # noqa: ANN401
    if issubclass(kind, StrEnum):
        if value not in [str(member) for member in kind]:
            _fail(key, value, "one of " + ", ".join(kind))
        return kind(value)
    if type(value) is not kind:
        _fail(key, value, _PLAIN[kind])
    if isinstance(value, str) and (len(value) > _TEXT_CHARACTERS or not value.isprintable()):
        _fail(key, value, f"one line of at most {_TEXT_CHARACTERS} characters")
    return value


@cache
def _kinds(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _fail(key: str, value: object, wanted: str) -> NoReturn:
    raise MalformedError(f"{key} is {shown_json(value)}, must be {wanted}")


def _refuse(constant: str) -> NoReturn:
    raise MalformedError(f"it holds {constant}, which is no number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedError(f"the key {shown_json(twice)} occurs twice in one object")
    return found
