"""How `simulate` shows predictions, comparisons and the keys of a scenario."""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator, Sequence
from enum import StrEnum
from textwrap import wrap
from typing import Any, get_args, get_origin, get_type_hints

from offload_rt.cli.columns import columns, hanging
from offload_rt.cli.headline import pinning_line, split_lines
from offload_rt.cli.plan_experts import ExpertOutlook, hits_in_words
from offload_rt.costs.step import Prediction
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.planning.placement import Placement
from offload_rt.planning.scenarios.published import TOLERANCE, Comparison
from offload_rt.planning.scenarios.scenario import SCENARIO_VERSION, Scenario
from offload_rt.profiling.profile import Obtained
from offload_rt.session.summary import home_words
from offload_rt.units import format_size, format_speed

_ATTRIBUTE = re.compile(r"(\w+): (.*)")
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def model_table(  # noqa: PLR0913 - all but the first three by keyword
    checkpoint: Checkpoint,
    placement: Placement,
    made: Prediction,
    *,
    experts: ExpertOutlook | None,
    pinned_bytes: int,
    source: str,
    machine: str,
) -> str:
    """A placed model, `pinned_bytes` of its host memory pinned, and what its pass would take."""
    demand, kv = placement.demand, placement.demand.kv
    kept = "" if kv is None else f"the rest in {'host memory' if kv.host_bytes else 'a file'}"
    lines = [
        f"{checkpoint.name}: {checkpoint.config.model_type}, "
        f"{format_size(checkpoint.total_bytes)}, {checkpoint.config.num_layers} layers "
        f"(from {source})",
        f"on {machine}, as if nothing else ran there",
        _memory(f"{made.resident_layers} resident layers", placement.resident_bytes),
        _memory(f"{placement.slots} slots", placement.ring_bytes)
        if not placement.expert_slots
        else _memory(f"{placement.expert_slots} slots of experts", placement.pool_bytes),
        _memory("KV on the device", placement.kv_bytes, kept),
        _memory("head" if demand.rows_apart else "embedding, head", demand.base_bytes),
        *(_memory(*row) for row in placement.taken_rows),
    ]
    if placement.drafter_bytes:
        lines.append(_memory("drafting", placement.drafter_bytes))
    limit = f"the limit is {format_size(placement.device_limit_bytes)}"
    lines.append(_memory("device memory", placement.device_bytes, limit))
    for own, stripe in zip(placement.shares, placement.stripes, strict=True):
        lines.append(_memory(stripe.name, own.device_bytes, own.in_words))
    if placement.streams:
        away = home_words(placement.home)
        what = "experts" if placement.expert_slots else "streamed layers"
        lines.append(_memory(what, placement.streamed_bytes, f"in {away}"))
        if experts is not None:
            lines.append("  " + hits_in_words(experts))
        lines += split_lines(placement)
        if demand.host_base_bytes:
            lines.append(_memory("embedding", demand.host_base_bytes, "in host memory, by rows"))
        if demand.file_base_bytes:
            lines.append(_memory("embedding", demand.file_base_bytes, "in its file, by rows"))
        lines += pinning_line(placement.host_bytes, pinned_bytes)
    lines += prediction_table(made)
    return "\n".join(hanging(line, 35 if line.startswith("  ") else 2) for line in lines)


def prediction_table(made: Prediction) -> Iterator[str]:
    """The parts of a pass, a line each."""
    back = f", {_gb(made.kv_back_bytes)} back" if made.kv_back_bytes else ""
    yield "predicted, per pass in the steady state"
    rate = f"{format_speed(made.s_per_token)}, {made.tokens_per_pass:.2f} tokens per pass"
    yield _time("token", made.s_per_token, rate)
    yield _time("pass", made.step_s, f"limited by {made.limit}")
    host = f", {_gb(made.on_host_bytes)} of it behind, of experts the CPU computes"
    back += host if made.on_host_bytes else ""
    yield _time("  transfer", made.transfer_s, _gb(made.bytes_per_pass) + back)
    yield _time("  compute", made.compute_s, f"{made.streamed_layers} layers streamed")
    yield _time("  drafting", made.draft_s, "")
    yield _time("  waiting", made.stall_s, "nothing computes")
    if made.obtained is not Obtained.MEASURED:
        yield f"rests on {made.obtained} numbers of the profile"


def comparisons_table(rows: Sequence[Comparison]) -> str:
    """Published and predicted times; what was assumed is in the last column."""
    lines = [f"{'seconds per token':<46}{'published':>10}{'predicted':>10}{'error':>8}"]
    for row in rows:
        name = row.scenario.name + (" (pass)" if row.per == "pass" else "")
        assumed = f"  assumed: {', '.join(row.assumed)}" if row.assumed else ""
        verdict = "" if row.hit else "  MISS"
        lines.append(
            f"{name:<46}{row.found_s:>10.4g}{row.predicted_s:>10.4g}{row.error:>+8.0%}"
            f"{verdict}{assumed}"
        )
    hits = sum(row.hit for row in rows)
    lines.append(f"{hits} of {len(rows)} within {TOLERANCE:.0%}")
    return "\n".join(hanging(line, 4) for line in lines)


def scenario_help() -> str:
    """All keys of a scenario file, with units, bounds and defaults."""
    lines = [
        f"A scenario is a JSON object; schema_version is {SCENARIO_VERSION}. "
        "Units are in the names of the keys.",
    ]
    waiting: list[tuple[str, Any]] = [("", Scenario)]
    while waiting:
        prefix, record = waiting.pop(0)
        summary, docs = _attributes(record)
        title = prefix.rstrip(".") or "the object"
        lines += ["", *wrap(f"{title}: {summary}", columns())]
        for field in dataclasses.fields(record):
            kind, inner = _kind(get_type_hints(record)[field.name])
            lines += _help_lines(field, kind, docs.get(field.name, ""))
            if inner is not None and (f"{prefix}{field.name}.", inner) not in waiting:
                waiting.append((f"{prefix}{field.name}.", inner))
    return "\n".join(lines)


def _help_lines(field: "dataclasses.Field[Any]", kind: str, doc: str) -> list[str]:
    default = ""
    if field.default is dataclasses.MISSING:
        default = ", needed"
    elif not dataclasses.is_dataclass(field.default) and field.default not in (None, ()):
        default = f", {field.default} if left out"
    text = f"{field.name} ({kind}{default})" + (f": {doc}" if doc else "")
    return wrap(text, columns(), initial_indent="  ", subsequent_indent="      ")


def _kind(hint: Any) -> tuple[str, Any]:  # noqa: ANN401
    """How a type is called in JSON, and the record it holds, if any."""
    if isinstance(hint, types.UnionType):
        (hint,) = [option for option in get_args(hint) if option is not types.NoneType]
    if get_origin(hint) is tuple:
        name, inner = _kind(get_args(hint)[0])
        return f"list of {name}", inner
    if dataclasses.is_dataclass(hint):
        return "object", hint
    if issubclass(hint, StrEnum):
        return "one of " + ", ".join(hint), None
    return _PLAIN[hint], None


def _attributes(record: Any) -> tuple[str, dict[str, str]]:  # noqa: ANN401
    """The summary of a record's docstring, and what it says of each attribute."""
    text = inspect.getdoc(record) or ""
    summary, _, rest = text.partition("Attributes:")
    docs: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        match = _ATTRIBUTE.fullmatch(line.strip())
        if match and line.startswith("    ") and not line.startswith("     "):
            name = match[1]
            docs[name] = match[2]
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return " ".join(summary.split()), docs


def _memory(what: str, nbytes: int, detail: str = "") -> str:
    return f"  {what:<22}{format_size(nbytes):>9}  {detail}".rstrip()


def _time(what: str, seconds: float, detail: str) -> str:
    return f"  {what:<22}{seconds:>9.4g} s  {detail}".rstrip()


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
