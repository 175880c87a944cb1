"""What a run measured, as a block of lines and as the JSON object."""

import dataclasses
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from offload_rt.cli.answering import Answering
from offload_rt.config import AcceptRule
from offload_rt.printable import printable
from offload_rt.report import Exactness, ExpertUse, Memory, RetrievalCounts, RunReport
from offload_rt.session.answering import Answer
from offload_rt.session.summary import (
    PlanSummary,
    drafter_name,
    drafts_name,
    dtype_name,
    summary_of,
)
from offload_rt.units import format_rate, format_size, format_speed

if TYPE_CHECKING:
    from offload_rt.planning.planner import Plan

_LABEL_WIDTH = 9
STATS_INDENT = 2 + _LABEL_WIDTH
_SHOWN_DEPTHS = 5


def format_stats(answering: Answering, answer: Answer) -> str:
    """The block shown after an answer."""
    report, engine = answer.report, answering.engine
    timings, transfer, memory = report.timings, report.transfer, report.memory
    lines = [
        ("model", f"{answering.model.name}, {dtype_name(engine)} on {engine.devices.name}"),
        ("layers", _layers(report)),
        ("tokens", _tokens(answer)),
        ("speed", _speed(answer)),
        ("exact", _exactness(report.exact)),
    ]
    if engine.plan.prediction is not None:
        lines.append(("plan", _planned(engine.plan)))
    if engine.draft.drafts:
        lines.append(("drafting", _drafting(answering, answer)))
    if (counts := report.speculation.retrieval) is not None:
        lines.append(("retrieve", _retrieval(answering, counts)))
    lines += _experts(report.experts)
    if memory.streamed_layers or report.experts is not None:
        share = transfer.stall_s / max((timings.ttft_s or 0.0) + timings.decode_s, 1e-9)
        lines += [
            (
                "link",
                f"{format_size(transfer.bytes_per_pass)} per pass, achieved "
                f"{format_rate(transfer.achieved_bytes_per_s)} of the link's "
                f"{format_rate(transfer.link_bytes_per_s)}",
            ),
            (
                "waiting",
                f"{transfer.stall_s:.2f} s for copies ({share:.0%} of the time), "
                f"overlap {transfer.overlap_ratio:.0%}",
            ),
        ]
    if (weights := report.dequantising) is not None:
        lines.append(("weights", f"dequantised by {weights.decoder}"))
    if transfer.kv_bytes_total:
        passes = max(1, report.speculation.passes)
        lines.append(
            (
                "kv",
                f"{format_size(transfer.kv_bytes_total)} over the link, written and read back, "
                f"{format_size(transfer.kv_bytes_total // passes)} per pass",
            )
        )
    lines.append(
        (
            "memory",
            f"peak {format_size(memory.device_peak_bytes)}, planned "
            f"{format_size(memory.device_planned_bytes)}, limit "
            f"{format_size(memory.device_limit_bytes)}; "
            f"whole process {format_size(memory.host_peak_bytes)}",
        )
    )
    for one in memory.devices:
        peak = "" if one.peak_bytes is None else f"peak {format_size(one.peak_bytes)}, "
        text = (
            f"{one.name}: {one.resident_layers} layers resident, {one.streamed_layers} streamed; "
            f"{peak}planned {format_size(one.planned_bytes)}, limit {format_size(one.limit_bytes)}"
        )
        lines.append(("", text))
    if memory.host_pinned_bytes or memory.host_unpinned_bytes:
        lines.append(("on the GPU", _gpu_memory(memory)))
    return "\n".join(f"  {label:<{_LABEL_WIDTH}}{printable(text)}" for label, text in lines)


def _exactness(exact: Exactness) -> str:
    """Whether passes were row-invariant."""
    if exact.on:
        return "a row has the same bits in any pass, so drafting changed none"
    return f"off: {exact.why}"


def _gpu_memory(memory: Memory) -> str:
    """What a GPU's allocator and driver say beside the peak, and how much host memory is pinned."""
    parts = [f"{format_size(memory.device_peak_bytes)} allocated at most"]
    parts.append(f"{format_size(memory.device_reserved_bytes)} reserved")
    if memory.device_driver_bytes is not None:
        parts.append(f"{format_size(memory.device_driver_bytes)} by the driver's count")
    parts.append(f"{format_size(memory.host_pinned_bytes)} of host memory pinned")
    if memory.host_unpinned_bytes:
        refused = format_size(memory.host_unpinned_bytes)
        parts.append(f"{refused} refused ({memory.pin_refusal}) and copied once more")
    return ", ".join(parts)


def as_json(answering: Answering, answer: Answer) -> dict[str, Any]:
    """The object of `generate --json`; names are stable, more may be added."""
    engine, report = answering.engine, answer.report
    summary = summary_of(engine)
    return {
        "model": str(answering.model.checkpoint.folder),
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "seed": answer.seed,
        "sampling": dataclasses.asdict(answering.settings.sampling) | {"seed": answer.seed},
        "device": engine.devices.name,
        "dtype": dtype_name(engine),
        "wire": str(engine.config.wire),
        "versions": versions(),
        **dataclasses.asdict(report),
        "plan": _plan(summary),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part in an answer."""
    packages = ("offload-rt", "torch", "transformers")
    found = {name.replace("-", "_"): version(name) for name in packages}
    return found | {"python": platform.python_version()}


def _plan(summary: PlanSummary) -> dict[str, Any]:
    predicted = summary.prediction
    s_per_token = predicted.s_per_token if predicted else None
    return dataclasses.asdict(summary) | {"predicted_s_per_token": s_per_token}


def _planned(plan: "Plan") -> str:
    """What the planner expected, and what of."""
    prediction = plan.prediction
    assert prediction is not None
    return (
        f"{drafts_name(plan)}; predicted {format_speed(prediction.s_per_token)}, "
        f"{prediction.s_per_token:.3f} s/token, most of it {prediction.limit}"
    )


def _layers(report: RunReport) -> str:
    """Which layers stay, and how the others or their experts come."""
    memory, experts = report.memory, report.experts
    layers = memory.resident_layers + memory.streamed_layers
    if experts is not None:
        return (
            f"all {layers} layers resident but for {experts.experts} experts, through "
            f"{_count(experts.slots, 'slot')} of {format_size(experts.slot_bytes)}"
        )
    if not memory.streamed_layers:
        return f"all {layers} layers resident"
    ring = _count(memory.slots, "slot")
    return (
        f"{memory.resident_layers} of {layers} layers resident, "
        f"{memory.streamed_layers} streamed through {ring} of {format_size(memory.slot_bytes)}"
    )


def _experts(experts: ExpertUse | None) -> list[tuple[str, str]]:
    """How many were there, if they come one by one."""
    if experts is None or experts.hit_rate is None:
        return []
    read = format_size(round(experts.bytes_per_token or 0))
    there = f"{experts.hit_rate:.0%} there of {experts.union:.1f} a layer and pass"
    unused = experts.unused + experts.prompt_unused
    vain = f", {_count(unused, 'expert')} read ahead in vain" if unused else ""
    if experts.on_host:
        part = experts.on_host / experts.misses
        there = f"{there}, {part:.0%} of the others computed on the CPU"
    if experts.looked_ahead:
        there = f"{there}, {experts.looked_ahead:.0%} of passes looked ahead"
    if experts.host_bytes and experts.file_bytes:
        part = experts.file_bytes / (experts.host_bytes + experts.file_bytes)
        read = f"{read} read per token, {part:.0%} of it from files"
    else:
        read = f"{read} read per token"
    return [("experts", f"{there}, {read}{vain}")]


def _tokens(answer: Answer) -> str:
    seed = "" if answer.seed is None else f", seed {answer.seed}"
    return (
        f"{answer.prompt_tokens} in, {len(answer.token_ids)} out, ended by "
        f"{answer.finish_reason}, {rule_name(answer.report.speculation.accept_rule)}{seed}"
    )


def _drafting(answering: Answering, answer: Answer) -> str:
    speculation = answer.report.speculation
    name = drafter_name(answering.engine.draft)
    if speculation.acceptance_rate is None or speculation.tokens_per_pass is None:
        return f"{name}, nothing was drafted"
    depths = speculation.acceptance_per_depth[:_SHOWN_DEPTHS]
    moved = format_size(speculation.draft_link_bytes)
    meanwhile = f", {moved} came in meanwhile" if speculation.draft_link_bytes else ""
    return (
        f"{name}, {speculation.accepted} of {speculation.drafted} drafted accepted "
        f"({speculation.acceptance_rate:.0%}), {speculation.tokens_per_pass:.2f} tokens/pass, "
        f"by depth {' '.join(f'{rate:.0%}' for rate in depths)}, drafting "
        f"{speculation.draft_s:.2f} s ({speculation.draft_share or 0.0:.0%} of the time after the "
        f"first token){meanwhile}"
    )


def _retrieval(answering: Answering, counts: RetrievalCounts) -> str:
    config = answering.engine.draft
    chosen = config.retrieval
    share = f" ({counts.accepted / counts.drafted:.0%})" if counts.drafted else ""
    builds = "once" if counts.builds == 1 else f"{counts.builds} times"
    if counts.newest_builds:
        builds += f", {counts.newest_builds} of them the newest only"
    return (
        f"{_count(counts.passes, 'pass')}"
        f"{f' of {chosen.retrieval_weights} copies' if chosen.rounded else ''}"
        f" over at most {chosen.budget_tokens} tokens in chunks of "
        f"{chosen.chunk_tokens}, chosen {builds}; {counts.accepted} of {counts.drafted} tokens "
        f"drafted by {drafter_name(config.inner)} accepted{share}"
    )


def rule_name(rule: str) -> str:
    """The accept rule; one that changes the distribution says so."""
    return f"{rule} (changes the distribution)" if rule == AcceptRule.TYPICAL else rule


def _speed(answer: Answer) -> str:
    timings = answer.report.timings
    first = "no token" if timings.ttft_s is None else f"first token after {timings.ttft_s:.2f} s"
    start = f"{first}, loaded in {timings.load_s:.2f} s"
    if timings.s_per_token is None or timings.tokens_per_s is None:
        return start
    return f"{timings.tokens_per_s:.2f} tokens/s, {timings.s_per_token:.3f} s/token, {start}"


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number} {what}" if number == 1 else f"{number} {plural}"
