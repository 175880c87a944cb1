"""What a user may set: a field of a record, with its flag, bounds and help in the field's metadata.

The options of the command line, the keywords of `offload_rt.load` and what a plan file may hold are
all read from there. A value is read the same way, whoever gives it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, TypeVar, get_args

from offload_rt.errors import ConfigError
from offload_rt.units import parse_size

RecordT = TypeVar("RecordT")


class Form(StrEnum):
    """How a value is written; the name is what help shows for it."""

    INTEGER = "integer"
    NUMBER = "float"
    TEXT = "text"
    PATH = "path"
    TEXTS = "texts"
    SWITCH = "boolean"
    CHOICE = "choice"
    SIZE = "size"
    SIZES = "size[,size]"
    RATES = "rate[,rate]"
    AUTO_INTEGER = "auto|n"
    AUTO_NUMBER = "auto|share"
    WINDOW = "auto|full|n"
    DRAFTER = "drafter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How a field is set.

    Attributes:
        flag: its option; the keyword in Python is the same without dashes in front, `_` for `-`.
        help: what it is for.
        also: other names of the option.
        form: how a value is written; None: as the field's type says.
        low: least value, if there is one; with `above` it is itself too little.
        high: largest value, if there is one; with `below` it is itself too much.
        accepted: the bounds in words.
        short: other words for choices.
        unset: what help shows for a default of None.
    """

    flag: str
    help: str
    also: tuple[str, ...] = ()
    form: Form | None = None
    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    accepted: str = ""
    short: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unset: str = ""

    @property
    def keyword(self) -> str:
        """Its name in Python."""
        return self.flag.removeprefix("--").replace("-", "_")

    def within(self, value: float) -> bool:
        """Whether a number is within the bounds; NaN never is."""
        low, high = self.low, self.high
        over = low is None or (value > low if self.above else value >= low)
        return over and (high is None or (value < high if self.below else value <= high))


def option(default: object, flag: str, help: str, **more: Any) -> Any:  # noqa: ANN401
    """A field that a user may set; `more` are other attributes of its `Option`."""
    said = {"option": Option(flag=flag, help=help, **more)}
    return dataclasses.field(default=default, metadata=said)


@dataclass(frozen=True, slots=True)
class Settable:
    """A field of a record, and how it is set."""

    name: str
    type: Any
    default: Any
    option: Option

    @property
    def form(self) -> Form:
        """How a value is written."""
        if self.option.form is not None:
            return self.option.form
        if isinstance(self.type, UnionType):
            return Form.AUTO_NUMBER if float in get_args(self.type) else Form.AUTO_INTEGER
        if isinstance(self.type, type) and issubclass(self.type, StrEnum):
            return Form.CHOICE
        return {int: Form.INTEGER, float: Form.NUMBER, bool: Form.SWITCH, str: Form.TEXT}.get(
            self.type, Form.TEXTS
        )

    @property
    def choices(self) -> list[str]:
        """What may be chosen; `none` is for our own use."""
        return [str(choice) for choice in self.type if choice != "none"]

    def read(self, value: object) -> Any:  # noqa: ANN401 - a value of the field's type
        """The field's value of a text, or of a value as Python has it.

        Raises:
            ValueError: it is none; the message says why.
        """
        return _READERS[self.form](self, value)

    def read_or_refuse(self, value: object) -> Any:  # noqa: ANN401
        """The same, for who has no parser that names the option.

        Raises:
            ConfigError: it is none.
        """
        try:
            return self.read(value)
        except ValueError as error:
            names = " / ".join(repr(name) for name in (*self.option.also, self.option.flag))
            raise ConfigError(f"Invalid value for {names}: {error}") from error


def settables(record: type) -> Iterator[Settable]:
    """The fields of a record that a user may set, in their order."""
    for field in dataclasses.fields(record):
        if (said := field.metadata.get("option")) is not None:
            yield Settable(field.name, field.type, field.default, said)


def check_bounds(record: object) -> None:
    """Refuse numbers out of their bounds.

    Raises:
        ConfigError: the first of them.
    """
    for field in settables(type(record)):
        given, said = getattr(record, field.name), field.option
        for value in given if isinstance(given, tuple) else (given,):
            if said.accepted and value is not None and not said.within(value):
                raise ConfigError(f"{said.flag} is {value}, accepted is {said.accepted}")


def record_of(record: type[RecordT], values: Mapping[str, Any]) -> RecordT:
    """A record from values as JSON has them, by the names of fields."""
    given = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        if field.name not in values:
            continue
        value, kind = values[field.name], field.type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            value = record_of(kind, value)
        elif isinstance(kind, type) and issubclass(kind, StrEnum):
            value = kind(value)
        elif isinstance(value, list):
            value = tuple(value)
        given[field.name] = value
    return record(**given)


def _integer(field: Settable, value: object) -> int | None:
    if value is None and field.default is None:
        return None
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{str(value)!r} is not a valid integer") from None


def _number(_: Settable, value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise ValueError(f"{str(value)!r} is not a valid float") from None


def _auto_integer(_: Settable, value: object) -> int | None:
    if value is None or value == "auto":
        return None
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{str(value)!r} is neither auto nor a whole number") from None


def _auto_number(_: Settable, value: object) -> float | None:
    if value is None or value == "auto":
        return None
    try:
        return float(str(value))
    except ValueError:
        raise ValueError(f"{str(value)!r} is neither auto nor a number") from None


def _window(_: Settable, value: object) -> int | None:
    if value is None or value == "auto":
        return None
    if value == "full":
        return 0
    try:
        if (window := int(str(value))) > 0:
            return window
    except ValueError:
        pass
    raise ValueError(f"{str(value)!r} is neither auto nor full nor a number of tokens")


def _size(_: Settable, value: object) -> int | None:
    if value is None:
        return None
    try:
        return value if type(value) is int and value > 0 else parse_size(str(value))
    except (ConfigError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _sizes(field: Settable, value: object) -> int | tuple[int, ...] | None:
    """A size, or one of each of several devices."""
    return _one_or_each(value, lambda part: _size(field, "" if part is None else part))


def _rates(field: Settable, value: object) -> float | tuple[float, ...] | None:
    """Bytes a second, of GB/s; or those of each of several devices."""

    def rate_of(part: object) -> float:
        rate = _number(field, part)
        if not rate > 0:
            raise ValueError(f"{rate} is not in the range x>0")
        return rate * 1e9

    return _one_or_each(value, rate_of)


def _one_or_each(value: object, read: Callable[[object], Any]) -> Any:  # noqa: ANN401 - a field's
    """A value, or several with commas between them or in a list."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return None if value is None else read(value)
    return tuple(map(read, parts)) if len(parts) != 1 else read(parts[0])


def _text(field: Settable, value: object) -> str | None:
    if value is None and field.default is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{str(value)!r} is not a text")
    text = os.fspath(value)
    if not isinstance(text, str) or "\0" in text:  # no argument can hold one, and no path may
        raise ValueError(f"{text!r} is not a text without zero bytes")
    return text


def _texts(field: Settable, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{str(value)!r} is neither a text nor a list of texts")
    return tuple(value)


def _switch(_: Settable, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{str(value)!r} is not a valid boolean")
    return value


def _choice(field: Settable, value: object) -> StrEnum:
    word = field.option.short.get(str(value), str(value))
    if word not in field.choices:
        listed = ", ".join(map(repr, field.choices))
        raise ValueError(f"{str(value)!r} is not one of {listed}")
    chosen: StrEnum = field.type(word)
    return chosen


_READERS: Mapping[Form, Callable[[Settable, object], Any]] = {
    Form.INTEGER: _integer,
    Form.NUMBER: _number,
    Form.TEXT: _text,
    Form.PATH: _text,
    Form.TEXTS: _texts,
    Form.SWITCH: _switch,
    Form.CHOICE: _choice,
    Form.SIZE: _size,
    Form.SIZES: _sizes,
    Form.RATES: _rates,
    Form.AUTO_INTEGER: _auto_integer,
    Form.AUTO_NUMBER: _auto_number,
    Form.WINDOW: _window,
    Form.DRAFTER: _text,
}
