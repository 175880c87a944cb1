"""Defaults of the user's own: variables `OFFLOAD_RT_...` and one file, `config.toml`.

A flag counts before a variable, a variable before the file, the file before what is built in. What
is said of one verb counts before what is said of all verbs. Names are those of the options. A name
that is not known is an error, so a slip of the pen cannot go unseen.
"""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from offload_rt.cli.options import option_key, section_names, shared_options
from offload_rt.cli.pages import VERBS, load_verb
from offload_rt.errors import ConfigError

PREFIX = "OFFLOAD_RT_"
COMMON = "common"
# Variables that are no option's: where the demo model is, which file is read, whether tracebacks
# are shown.
_OTHERS = frozenset({"OFFLOAD_RT_CACHE", "OFFLOAD_RT_CONFIG", "OFFLOAD_RT_DEBUG"})
_FILE_LIMIT_BYTES = 2**20
# How often drafts are right has to be said to `simulate` with them, so no common drafter is its.
# What train-medusa draws is for training.
_NOT_COMMON = frozenset({("simulate", "draft"), ("train-medusa", "temperature")})
WITHOUT_DEFAULTS = frozenset({"help", "config", "completion"})
_SAME = {"run": "generate"}  # verbs that take their defaults from another's


@dataclass(frozen=True, slots=True)
class Default:
    """A value in place of a built-in one.

    Attributes:
        origin: the variable, or the place in the file.
    """

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The user's file, read.

    Attributes:
        sections: what it says of `common` and of verbs.
        text: all of it, to find lines in.
    """

    path: Path
    sections: Mapping[str, Any]
    text: str

    def place(self, section: str, key: str = "") -> str:
        """Where a section or a key of it is in the file, for messages."""
        start = re.search(rf"^\s*\[\s*{re.escape(section)}\s*\]", self.text, re.MULTILINE)
        at = start.start() if section and start else 0
        if key:
            written = re.compile(rf"^\s*[\"']?{re.escape(key)}[\"']?\s*=", re.MULTILINE)
            found = written.search(self.text, at)
            at = found.end() if found else at
        line = self.text.count("\n", 0, at) + 1
        return f"{self.path} line {line}" + (f", [{section}]" if section else "")


def config_path() -> Path:
    """Where the file is looked for; OFFLOAD_RT_CONFIG names another."""
    if given := os.environ.get("OFFLOAD_RT_CONFIG"):
        return Path(given).expanduser()
    import platformdirs

    return platformdirs.user_config_path("offload-rt") / "config.toml"


def read_config() -> ConfigFile | None:
    """Read the file; None where there is none and none is named.

    Raises:
        ConfigError: it cannot be read, is not TOML, or has a section that no verb has.
    """
    path = config_path()
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT_BYTES + 1)
    except FileNotFoundError as error:
        if "OFFLOAD_RT_CONFIG" in os.environ:
            raise ConfigError(
                f"OFFLOAD_RT_CONFIG names {path}, which does not exist: make it, unset the "
                "variable, or use --no-config"
            ) from error
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; --no-config goes without it") from error
    if len(data) > _FILE_LIMIT_BYTES:
        raise ConfigError(f"{path} is larger than {_FILE_LIMIT_BYTES} bytes: it is no config.toml")
    try:
        text = data.decode("utf-8-sig")
        sections = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    found = ConfigFile(path, sections, text)
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(
                f"{found.place('', name)}: {name} is in no section: put it below [common]"
            )
        known = {COMMON, *VERBS} - WITHOUT_DEFAULTS - _SAME.keys()
        if name not in known:
            hint = _SAME.get(name) or next(iter(get_close_matches(name, known)), COMMON)
            raise ConfigError(f"{found.place(name)}: no verb is called {name}: write [{hint}]")
    return found


def defaults_of(verb: str, command: click.Command, file: ConfigFile | None) -> dict[str, Default]:
    """The user's defaults for a verb, by the names of its parameters.

    Raises:
        ConfigError: a variable or a key of the sections read is not known or has a wrong type.
    """
    verb = _SAME.get(verb, verb)
    options = _by_key(command)
    found = {} if file is None else _from_file(verb, options, file)
    _check_variables()
    for key in dict.fromkeys(map(option_key, options.values())):
        for variable in variables_of(verb, key):
            if text := os.environ.get(variable):
                option = options[key]
                found[option.name or ""] = Default(_listed(option, text), variable)
    return found


def _from_file(
    verb: str, options: Mapping[str, click.Option], file: ConfigFile
) -> dict[str, Default]:
    """What the file says of a verb: in the common section, then in the verb's own."""
    found: dict[str, Default] = {}
    for section in (COMMON, verb):
        for key, value in file.sections.get(section, {}).items():
            place, name = file.place(section, key), key.replace("_", "-")
            known = shared_options() if section == COMMON else options
            if name not in known:
                raise ConfigError(f"{place}: {_unknown(key, [*known])}")
            option = options.get(option_key(known[name]))
            if option is not None and (section == verb or (verb, name) not in _NOT_COMMON):
                _check_type(option, value, f"{place}: {key}")
                found[option.name or ""] = Default(_listed(option, value), place)
    return found


def variables_of(verb: str, key: str) -> list[str]:
    """The variables that set an option of a verb, the one that counts most last."""
    names = [f"{PREFIX}{_upper(verb)}_{_upper(key)}"]
    if key in section_names() and (verb, key) not in _NOT_COMMON:
        names.insert(0, PREFIX + _upper(key))
    return names


def verb_options() -> Iterator[tuple[str, list[click.Option]]]:
    """Each verb that has defaults of its own, with its options."""
    for verb in VERBS:
        command = None if verb in WITHOUT_DEFAULTS or verb in _SAME else load_verb(verb)
        if command is not None and (options := _by_key(command)):
            yield verb, list(dict.fromkeys(options.values()))


def _by_key(command: click.Command) -> dict[str, click.Option]:
    """The options that may have a default of the user's, by all their long names."""
    if isinstance(command, click.Group):
        return {}
    options = [p for p in command.params if isinstance(p, click.Option) and p.expose_value]
    return {name[2:]: o for o in options for name in o.opts if name.startswith("--")}


def _check_variables() -> None:
    """Refuse variables that are no option's; verbs are imported only for those of one verb."""
    known = {PREFIX + _upper(key) for key in section_names()} | _OTHERS
    strange = [n for n in os.environ if n.startswith(PREFIX) and n not in known]
    if not strange:
        return
    for verb, options in verb_options():
        known |= {name for o in options for name in variables_of(verb, option_key(o))}
    for name in strange:
        if name not in known:
            raise ConfigError(f"the variable {_unknown(name, sorted(known))}")


def _unknown(name: str, known: Sequence[str]) -> str:
    alike = get_close_matches(name if name.isupper() else name.replace("_", "-"), known)
    hint = f"did you mean {alike[0]}?" if alike else "`offload-run config --template` lists all"
    return f"{name} is no option's name here: {hint}"


def _check_type(option: click.Option, value: object, what: str) -> None:
    if option.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{what} is {value!r}, accepted is true or false")
        return
    values = value if isinstance(value, list) and option.multiple else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            raise ConfigError(f"{what} is {one!r}, accepted is a text or a number")
        if "\0" in str(one):  # an argument or a variable cannot hold one, and no path may
            raise ConfigError(f"{what} is {one!r}, a text with a zero byte: take it out")


def _listed(option: click.Option, value: object) -> object:
    """The value as click expects it: a list where an option may be given several times."""
    return [value] if option.multiple and not isinstance(value, list) else value


def _upper(name: str) -> str:
    return name.upper().replace("-", "_")
