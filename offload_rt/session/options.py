"""Keywords of Python to records: the options of the command line, under the same names."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from offload_rt.config import (
    DraftConfig,
    GenerationConfig,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.errors import ConfigError
from offload_rt.options import record_of, settables
from offload_rt.planning.plan_file import PlanFile, read_plan
from offload_rt.session.settings import Settings, check_accept, read_drafter, without_effect

_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_TEXTS = {"system": "--system", "profile": "--profile", "adapter": "--adapter", "plan": "--plan"}
_RECORDS = (RuntimeConfig, DraftConfig, RetrievalConfig, SamplingConfig, GenerationConfig)
_BY_KEYWORD = {f.option.keyword: f for record in _RECORDS for f in settables(record)}
ANSWER_KEYWORDS = {
    f.option.keyword for r in (SamplingConfig, GenerationConfig) for f in settables(r)
}
ANSWER_KEYWORDS |= {"system", "raw", "sampling"}
KEYWORDS = {*_BY_KEYWORD, *_TEXTS, *ANSWER_KEYWORDS}


def settings_from(options: Mapping[str, Any]) -> Settings:
    """The records that keywords of `load` stand for; `draft` is `auto` where it is left out.

    Raises:
        ConfigError: a value is out of range, or an option would have no effect.
    """
    values = _read(options)
    plan = None
    if values.get("plan") is not None:
        path = Path(values["plan"])
        plan = read_plan(path)
        values = with_plan(values, plan, path, lambda name: name in values)
    values.setdefault("draft", "auto")
    base = Settings(
        sampling=SamplingConfig(),
        generation=GenerationConfig(),
        runtime=record_of(RuntimeConfig, values),
        draft=record_of(DraftConfig, {**values, "retrieval": values}),
        profile=values.get("profile"),
        plan=plan,
        adapter=values.get("adapter"),
    )
    return _answering(base, values, frozenset(values))


def answer_settings(
    base: Settings, defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> Settings:
    """The same for one answer.

    Args:
        base: as the model was loaded.
        defaults: what `load` was given about answers.
        options: what this answer is given; what has no effect there is an error.

    Raises:
        ConfigError: a value is out of range, or an option would have no effect.
    """
    return _answering(base, _read({**defaults, **options}), frozenset(options))


def _answering(base: Settings, values: Mapping[str, Any], chosen: frozenset[str]) -> Settings:
    sampling, own = _sampling(values, chosen)
    if own is None:
        check_accept(sampling, base.draft)
    return replace(
        base,
        sampling=sampling,
        generation=record_of(GenerationConfig, values),
        system=values.get("system"),
        raw=values.get("raw", False),
        own_sampling=own,
    )


def check_keywords(options: Collection[str], known: Collection[str], where: str) -> None:
    """Refuse names that are no option.

    Raises:
        ConfigError: the first of them.
    """
    for name in options:
        if name not in known:
            alike = get_close_matches(name, known)
            hint = f"did you mean {alike[0]}?" if alike else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"{where} has no option {name}: {hint}")


def with_plan(
    values: Mapping[str, Any], plan: PlanFile, path: Path, given: Callable[[str], bool]
) -> dict[str, Any]:
    """Values by the names of fields, with those of a plan in place of what was left open.

    Args:
        values: read already.
        plan: from `read_plan`.
        path: its file, for messages.
        given: whether the user set a field.

    Raises:
        ConfigError: an option contradicts the plan.
    """
    flags = {field.name: field.option.flag for field in _BY_KEYWORD.values()}
    merged = dict(values)
    for name, value in plan.options.items():
        if given(name) and str(values[name]) != str(value):
            raise ConfigError(
                f"{flags[name]} is {values[name]}, --plan {path} has {value}: leave out one of "
                "them, or edit the plan"
            )
        merged[name] = value
    if given("resident_layers"):
        raise ConfigError(
            f"--resident-layers contradicts --plan {path}, which names the layers: leave out one"
        )
    return merged | {"resident": plan.resident, "whole_layers": plan.whole_layers}


def _read(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of fields."""
    values: dict[str, Any] = {}
    for keyword, value in options.items():
        if (field := _BY_KEYWORD.get(keyword)) is not None:
            values[field.name] = field.read_or_refuse(value)
        elif keyword in _TEXTS and value is not None:
            if not isinstance(value, str | os.PathLike):
                raise ConfigError(f"{_TEXTS[keyword]} is {value!r}, accepted is a text")
            values[keyword] = os.fspath(value)
        elif keyword == "raw" and not isinstance(value, bool):
            raise ConfigError(f"--raw is {value!r}, accepted is True or False")
        elif keyword == "sampling" and value not in ("greedy", "model"):
            raise ConfigError(
                f"Invalid value for '--sampling': {value!r} is not one of 'greedy', 'model'"
            )
        else:
            values[keyword] = value
    if "draft" in values:
        try:
            values["draft"] = read_drafter(values["draft"])
        except ValueError as error:
            raise ConfigError(f"Invalid value for '--draft': {error}") from error
    return values


def _sampling(
    values: Mapping[str, Any], chosen: frozenset[str]
) -> tuple[SamplingConfig, frozenset[str] | None]:
    """How tokens are drawn; and with sampling="model" which options the user chose himself."""
    given = {name: values[name] for name in (*_SAMPLED, "seed") if name in values}
    own = None
    if values.get("sampling") == "model":
        own = frozenset(given) & frozenset(_SAMPLED)
    config = SamplingConfig(**given)
    if not config.greedy or (own is not None and "temperature" not in own):
        return config, own
    for name in _SAMPLED[1:]:
        default = getattr(SamplingConfig(), name)
        if given.get(name, default) != default and name in chosen:
            raise without_effect(name, values[name])
        given[name] = default  # a default for answers that are not greedy
    return SamplingConfig(**given), own
