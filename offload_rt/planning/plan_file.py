"""Plans as files: what a planner chose, to be looked at, edited and replayed. No torch here.

A plan names options of the command line with their values. So it says nothing an option could not,
and every check of an option is one of the plan. Beside them it keeps which layers stay on the
device, the model's name and number of layers, and what was predicted (for the reader only).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from offload_rt.config import DraftConfig, RetrievalConfig, RuntimeConfig
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.options import Form, Settable, settables
from offload_rt.planning.planner import Plan
from offload_rt.reading import without_mark
from offload_rt.writing import write_text

SCHEMA_VERSION = 1
_LIMIT_BYTES = 2**20

Value = str | int | float | None

_LEFT_OUT = {"resident_layers", "link_bytes_per_s", "readers", "threads", "accept"}
# Options a plan may fix, by the name of their field.
OPTIONS: Mapping[str, Settable] = {
    field.name: field
    for record in (RuntimeConfig, DraftConfig, RetrievalConfig)
    for field in settables(record)
    if field.name not in _LEFT_OUT
}
_KEYS = {"schema_version", "model", "layers", "options", "resident", "whole_layers", "predicted"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """A plan as it is written.

    Attributes:
        model: name of the model's folder.
        layers: how many it has.
        options: values of command-line options, by the names of `OPTIONS`.
        resident: layers that stay on the device.
        whole_layers: so many have their experts in them where those of others come one by one.
        predicted: what a step should take; for the reader.
    """

    model: str
    layers: int
    options: Mapping[str, Value]
    resident: tuple[int, ...]
    whole_layers: int = 0
    predicted: Mapping[str, object] | None = None


def plan_file(checkpoint: Checkpoint, plan: Plan) -> PlanFile:
    """What of a plan is written."""
    runtime, draft = plan.runtime, plan.drafting.config
    kv = plan.placement.demand.kv
    # A home on disk, once it is named, leaves a limit of host memory nothing to limit.
    limits_host = plan.placement.home.in_memory or (kv is not None and kv.host_bytes > 0)
    options: dict[str, Value] = {
        "device": runtime.device,
        "device_limit_bytes": _limits(plan),
        "host_limit_bytes": runtime.host_limit_bytes if limits_host else None,
        "dtype": str(runtime.dtype),
        "slots": plan.placement.slots or None,
        "wire": str(runtime.wire),
        "expert_slots": plan.placement.expert_slots or runtime.expert_slots,
        "look_ahead": str(runtime.look_ahead),
        "expert_misses": str(runtime.expert_misses),
        "home": str(plan.placement.home if plan.placement.streams else runtime.home),
        "context_tokens": runtime.context_tokens,
        "kv": str(kv.place) if kv else "device",
        "kv_block_tokens": runtime.kv_block_tokens if kv else None,
        "kv_folder": runtime.kv_folder if kv else None,
        "exact": str(runtime.exact),
        "draft": "none" if plan.watches else draft.draft,
        "draft_tokens": plan.first_nodes or None,
    }
    if draft.has_weights:
        options |= {"shape": str(draft.shape), "draft_weights": str(draft.draft_weights)}
    if draft.model:
        options |= {"draft_window": draft.draft_window}
    if draft.over_retrieval:
        options |= {"inner_tokens": draft.inner_tokens, **asdict(draft.retrieval)}
    return PlanFile(
        model=checkpoint.name,
        layers=checkpoint.config.num_layers,
        options=options,
        resident=plan.placement.resident,
        whole_layers=len(plan.placement.whole_layers),
        predicted=asdict(plan.prediction) if plan.prediction else None,
    )


def _limits(plan: Plan) -> Value:
    """The limit of the device, or those of several as they are typed."""
    limits = [own.device_limit_bytes for own in plan.placement.of_devices]
    return limits[0] if len(limits) == 1 else ",".join(map(str, limits))


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write a plan, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    text = json.dumps({"schema_version": SCHEMA_VERSION} | asdict(plan), indent=1)
    write_text(path, text + "\n")


def read_plan(path: Path) -> PlanFile:
    """Read a plan.

    Raises:
        ConfigError: it cannot be read, or is none this version knows.
    """
    raw = _read_object(path)
    unknown = sorted(set(raw) - _KEYS)
    if unknown:
        raise _unusable(path, f"it has {unknown[0]!r}, which no plan has")
    if raw.get("schema_version") != SCHEMA_VERSION:
        version = raw.get("schema_version")
        raise _unusable(path, f"schema_version is {version!r}, known is {SCHEMA_VERSION}")
    model, layers, resident = raw.get("model"), raw.get("layers"), raw.get("resident")
    if not isinstance(model, str) or not _is_count(layers):
        raise _unusable(path, "model must be a name and layers a number")
    whole = raw.get("whole_layers", 0)
    if not _is_count(whole):
        raise _unusable(path, "whole_layers must be a number")
    if not isinstance(resident, list) or not all(_is_count(layer) for layer in resident):
        raise _unusable(path, "resident must be a list of layers")
    return PlanFile(
        model=model,
        layers=layers,  # type: ignore[arg-type]
        options=_options(path, raw.get("options")),
        resident=tuple(resident),
        whole_layers=whole,  # type: ignore[arg-type]
    )


def _options(path: Path, raw: object) -> Mapping[str, Value]:
    if not isinstance(raw, dict):
        raise _unusable(path, "options must be an object")
    for name, value in raw.items():
        if name not in OPTIONS:
            raise _unusable(path, f"options has {name!r}; known are {', '.join(OPTIONS)}")
        if type(value) not in _types(OPTIONS[name]) and not _is_sizes(name, value):
            raise _unusable(path, f"options.{name} cannot be {json.dumps(value)}")
        if "\0" in str(value):
            raise _unusable(path, f"options.{name} is {json.dumps(value)}, with a zero byte")
        choices = OPTIONS[name].choices if OPTIONS[name].form is Form.CHOICE else []
        if choices and value not in choices:
            raise _unusable(
                path, f"options.{name} is {json.dumps(value)}; known are {', '.join(choices)}"
            )
    return {name: _value(path, name, value) for name, value in raw.items()}


def _value(path: Path, name: str, value: Value) -> Any:  # noqa: ANN401 - of the option's type
    """Sizes of several devices are a text; all else is as JSON has it."""
    if not _is_sizes(name, value):
        return value
    try:
        return OPTIONS[name].read(value)
    except ValueError as error:
        raise _unusable(path, f"options.{name} is {json.dumps(value)}: {error}") from error


def _is_sizes(name: str, value: object) -> bool:
    return OPTIONS[name].form is Form.SIZES and isinstance(value, str) and "," in value


def _types(field: Settable) -> tuple[type, ...]:
    """What JSON has for a field."""
    if field.form is Form.CHOICE:
        return (str,)
    types = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    return (*types, int) if float in types else types


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _read_object(path: Path) -> dict[str, object]:
    try:
        if not path.is_file():
            raise _unusable(path, "there is no such file")
        if path.stat().st_size > _LIMIT_BYTES:
            raise _unusable(path, f"it has more than the {_LIMIT_BYTES} bytes a plan may have")
        raw = json.loads(without_mark(path.read_bytes()).decode())
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"it is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise _unusable(path, "it is not a JSON object")
    return raw


def _unusable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"--plan {path} is not a usable plan: {why}; make one with `offload-run plan --output`"
    )
