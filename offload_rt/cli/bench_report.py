"""What `bench` measured, as Markdown and as JSON."""

import dataclasses
from typing import Any

from offload_rt.cli.bench_results import (
    BASELINE,
    DRAFTED,
    BenchReport,
    EngineFacts,
    Measured,
    PromptRow,
    Summary,
    summaries,
)
from offload_rt.cli.markdown import bullets, heading, table
from offload_rt.cli.stats import rule_name
from offload_rt.session.summary import drafter_name
from offload_rt.speculative.kinds import kind_of
from offload_rt.units import format_size

_NAMES = {BASELINE: "none", DRAFTED: "draft"}  # in JSON


def as_json(report: BenchReport) -> dict[str, Any]:
    """One object; names are stable, more may be added."""
    settings, greedy = report.settings, report.settings.sampling.greedy
    *categories, totals = [_summary_json(summary, greedy) for summary in summaries(report)]
    return {
        "model": report.model,
        "prompts": {
            "file": report.prompt_file,
            "in_file": report.prompts_in_file,
            "chosen": report.prompts_chosen,
            "measured": len(report.rows()),
        },
        "rounds": report.rounds,
        "interrupted": report.interrupted,
        "draft": dataclasses.asdict(report.draft)
        | {"draft_tokens": report.draft.nodes, "draft_window": report.draft.window_tokens},
        "sampling": dataclasses.asdict(settings.sampling),
        "generation": dataclasses.asdict(settings.generation),
        "raw": settings.raw,
        "system": settings.system,
        "versions": report.versions,
        "engines": {_NAMES[phase]: _engine_json(e) for phase, e in report.engines.items()},
        "categories": categories,
        "totals": totals,
        "rows": [_row_json(row, report) for row in report.rows()],
    }


def _engine_json(facts: EngineFacts) -> dict[str, Any]:
    placement = facts.placement
    return {
        "device": facts.device,
        "dtype": facts.dtype,
        "load_s": facts.load_s,
        "bytes_per_pass": facts.bytes_per_pass,
        "home": str(placement.home),
        "resident": list(placement.resident),
        "streamed": list(placement.streamed),
        "drafter_bytes": placement.drafter_bytes,
        "memory": dataclasses.asdict(facts.memory),
    }


def _summary_json(summary: Summary, greedy: bool) -> dict[str, Any]:
    record = dataclasses.asdict(summary)
    return record if greedy else record | {"same": None}  # sampled answers differ by right


def _row_json(row: PromptRow, report: BenchReport) -> dict[str, Any]:
    comparable = row.compared and report.settings.sampling.greedy
    return {
        "id": row.item.name,
        "category": row.item.category,
        "prompt_tokens": row.runs[0].prompt_tokens,
        "tokens_per_s": row.tokens_per_s(report.phase),
        "baseline_tokens_per_s": row.tokens_per_s(BASELINE) if report.compares else None,
        "ratio": row.ratio,
        "same": row.first_difference is None if comparable else None,
        "first_difference": row.first_difference if comparable else None,
        "runs": [_run_json(run) for run in row.runs],
    }


def _run_json(run: Measured) -> dict[str, Any]:
    return {
        "phase": _NAMES[run.phase],
        "round": run.round,
        "completion_tokens": len(run.token_ids),
        "finish_reason": run.finish_reason,
        "token_ids": list(run.token_ids),
        "timings": dataclasses.asdict(run.timings),
        "speculation": dataclasses.asdict(run.speculation),
    }


def as_markdown(report: BenchReport) -> str:
    """What decides the numbers, a table per category, and in a comparison one per prompt."""
    parts = [heading(f"offload-run bench: {report.model}"), _header(report), _categories(report)]
    if report.compares:
        parts.append(_prompts(report))
    parts.append(_legend(report))
    return "\n\n".join(parts)


def _header(report: BenchReport) -> str:
    settings, facts = report.settings, next(iter(report.engines.values()))
    sampling, draft = settings.sampling, report.draft
    how = "greedy"
    if not sampling.greedy:
        how = f"temperature {sampling.temperature}, seed {sampling.seed}"
    prompts = f"{report.prompts_chosen} of {report.prompts_in_file} in {report.prompt_file}"
    if report.interrupted:
        prompts += f", interrupted: {len(report.rows())} measured"
    longest = max(run.prompt_tokens for run in report.runs)
    lines = [
        f"model: {report.model}, {facts.dtype} on {facts.device}",
        f"prompts: {prompts}; up to {longest} tokens"
        f"{', raw' if settings.raw else ', chat template if the model has one'}",
        f"answers: up to {settings.generation.max_tokens} tokens, {how}",
        f"rounds: {report.rounds}",
    ]
    if draft.drafts:
        window = f", window of {draft.window_tokens} tokens" if draft.window_tokens else ""
        size = kind_of(draft.kind).size(draft)
        rule = report.runs[-1].speculation.accept_rule
        lines.append(
            f"draft: {drafter_name(draft)}, {size} {draft.nodes} tokens{window}, "
            f"accept {rule_name(rule)}"
        )
    lines += [f"{phase}: {_engine_line(engine)}" for phase, engine in report.engines.items()]
    if report.compares:
        lines.append(
            "same budget: the two engines ran one after the other, each with its own plan under "
            "the same limit"
        )
    known = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines.append(f"versions: {known}")
    return bullets(lines)


def _engine_line(facts: EngineFacts) -> str:
    memory = facts.memory
    layers = memory.resident_layers + memory.streamed_layers
    line = f"{memory.resident_layers} of {layers} layers resident"
    if memory.streamed_layers:
        line += f", {memory.streamed_layers} streamed ({format_size(facts.bytes_per_pass)} a pass)"
    return (
        f"{line}, device memory limit {format_size(memory.device_limit_bytes)}, "
        f"peak {format_size(memory.device_peak_bytes)}"
    )


def _categories(report: BenchReport) -> str:
    head = ["category", "prompts", "tokens", "tokens/pass", "acceptance", "tokens/s"]
    if report.compares:
        head += [f"tokens/s {BASELINE}", "ratio", "same text"]
    lines = []
    for one in summaries(report):
        cells = [
            one.category,
            str(one.prompts),
            str(one.tokens),
            _number(one.tokens_per_pass, ".2f"),
            _number(one.acceptance_rate, ".0%"),
            _with_spread(one),
        ]
        if report.compares:
            same = f"{one.same} of {one.compared}" if report.settings.sampling.greedy else "-"
            cells += [_number(one.baseline_tokens_per_s, ".2f"), _number(one.ratio, ".2f"), same]
        lines.append(cells)
    return table(head, lines)


def _prompts(report: BenchReport) -> str:
    head = ["prompt", "category", "tokens/s", f"tokens/s {BASELINE}", "ratio", "first difference"]
    lines = []
    for row in report.rows():
        difference = "none" if row.first_difference is None else f"token {row.first_difference}"
        if not row.compared or not report.settings.sampling.greedy:
            difference = "-"
        lines.append(
            [
                row.item.name,
                row.item.category,
                _number(row.tokens_per_s(DRAFTED), ".2f"),
                _number(row.tokens_per_s(BASELINE), ".2f"),
                _number(row.ratio, ".2f"),
                difference,
            ]
        )
    return table(head, lines)


def _legend(report: BenchReport) -> str:
    text = (
        "All numbers are measured. tokens/pass and tokens/s are of decoding, without the "
        "prompt's pass and the token it emits. tokens/pass: emitted tokens / passes over the "
        "model. acceptance: accepted / drafted tokens. tokens/s: median of the rounds for each "
        "prompt, then mean ± standard deviation over prompts."
    )
    if report.compares:
        text += (
            " ratio: tokens/s with drafting over without, per prompt; median over prompts. In "
            "bfloat16 and float16 texts may differ where two tokens are nearly equally likely, "
            "unless passes are row-invariant (--exact)."
        )
    return text


def _with_spread(summary: Summary) -> str:
    spread = summary.tokens_per_s_spread
    text = _number(summary.tokens_per_s, ".2f")
    return text if spread is None else f"{text} ± {spread:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
