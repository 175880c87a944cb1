"""What a comparison measured, as Markdown and as JSON; made from its raw rows and nothing else."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from offload_rt.baselines.engines import DRAFTED, OURS
from offload_rt.baselines.rows import Loaded, RawRows, drafter
from offload_rt.baselines.summary import (
    Difference,
    Figure,
    Summary,
    differences,
    per_prompt,
    summaries,
)
from offload_rt.cli.markdown import bullets, code, heading, table
from offload_rt.printable import in_markdown
from offload_rt.units import format_size

_SHOWN_CHARACTERS = 60
_CACHED_SHARE = 0.01  # of the weights; what is less cannot matter
_NEAR = 0.25  # logits; two bf16 steps at 16 to 32, where likely tokens' logits are

_FAIRNESS = (
    "Every engine gets the same checkpoint, dtype, prompt tokens, answer length and limits, and "
    "decodes greedily. Each runs in a process of its own, one at a time, in rounds that take "
    "turns; loading and a warm-up of 3 tokens (DeepSpeed records the order of modules in it) are "
    "not in the times.",
    "Bytes read are what the kernel counts for the process, page faults included, the same for "
    "all. Bytes over a GPU's link are counted by offload-rt only.",
    "deepspeed is ZeRO-Inference, tuned beyond its example script: buckets, live parameters and "
    "NVMe buffers of two layers, memory that is left keeps parameters from being offloaded, and "
    "the embedding never is. Its design spends memory on batches: look at tokens/s with large "
    "batches, where it is at its best, as well as at batch 1.",
    "accelerate reads what does not fit from the files, without reading ahead.",
    "transformers keeps all weights in memory: it is held to the cap of the process, not to the "
    "device memory. On the CPU its weights are mapped files, so where they do not fit it pages.",
    "Device memory on the CPU is what an engine's process has above what it had before loading, "
    "pages of mapped files included.",
)


def as_json(raw: RawRows) -> dict[str, Any]:
    """One object; names are stable, more may be added."""
    return {
        "setup": dataclasses.asdict(raw.setup),
        "engines": [dataclasses.asdict(summary) for summary in summaries(raw)],
        "failed": [dataclasses.asdict(row) for row in raw.failures()],
        "differences": [dataclasses.asdict(one) for one in differences(raw)],
        "configurations": {
            f"{row.run.engine}, batch {row.run.batch}": row.facts for row in _first_loads(raw)
        },
        "fairness": list(_FAIRNESS),
        "rows": len(raw.rows),
    }


def as_markdown(raw: RawRows) -> str:
    """Conditions, a table of engines, who could not run, prompts, differences, configurations."""
    found = summaries(raw)
    parts = [heading(f"offload-run compare: {raw.setup.model}"), _header(raw)]
    parts.append(_engines(found) if found else "Nothing was measured.")
    parts += [part for part in (_warnings(raw, found), _best(found), _failures(raw)) if part]
    if 1 in raw.setup.batches and found:
        parts.append(_prompts(raw))
    parts += [part for part in (_differences(raw),) if part]
    parts.append("## Fairness\n\n" + "\n".join(f"- {note}" for note in _FAIRNESS))
    parts.append(_configurations(raw))
    parts.append(_LEGEND)
    return "\n\n".join(parts)


def _header(raw: RawRows) -> str:
    setup = raw.setup
    tokens = [prompt.tokens for prompt in setup.prompts]
    machine = setup.machine
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    ends = "" if setup.ends else ", end tokens ignored"
    lines = [
        f"model: {setup.model}, {setup.dtype} on {setup.device}, "
        f"{format_size(setup.weights_bytes)} of weights",
        f"machine: {machine.cpu}, {machine.cores} cores, "
        f"{format_size(machine.ram_bytes)} of RAM, {gpus}",
        f"device memory: {format_size(setup.device_bytes)}",
        f"memory cap: {setup.cap}",
        f"page cache: {setup.page_cache}",
        f"prompts: {len(setup.prompts)} of {setup.prompt_file}, {min(tokens)} to {max(tokens)} "
        "tokens",
        f"answers: up to {setup.max_tokens} tokens, greedy{ends}",
        f"batch sizes: {', '.join(map(str, setup.batches))}",
    ]
    if (draft := drafter(setup)) is not None:
        lines.append(f"{DRAFTED}: --draft {draft['draft']}, {_draft_tokens(raw, draft)}")
    return f"{bullets(lines)}\n- command: {code(setup.command)}"


def _draft_tokens(raw: RawRows, draft: dict[str, Any]) -> str:
    """How many tokens are drafted, and who drafted where that was left open."""
    if draft["draft_tokens"] is not None:
        return f"{draft['draft_tokens']} tokens"
    loads = [row for row in _first_loads(raw) if row.run.engine == DRAFTED]
    each = [f"batch {row.run.batch} {_settled(row.facts)}" for row in loads]
    return "; ".join(["as many tokens as are measured to pay", *each])


def _settled(facts: dict[str, Any]) -> str:
    """Who drafted, as planned for a batch size."""
    config = facts.get("config")
    config = config if isinstance(config, dict) else {}
    draft = config.get("draft")
    name = draft.get("draft") if isinstance(draft, dict) else None
    if name is None:
        return "not planned"
    tokens = config.get("first_draft_tokens")
    return f"{name}" if tokens is None else f"{name}, {tokens} at first"


def _engines(found: Sequence[Summary]) -> str:
    drafted = any(summary.engine == DRAFTED for summary in found)
    head = ["engine", "batch", "rounds", "s/token", "tokens/s", f"{OURS} is faster"]
    head += [f"{DRAFTED} is faster"] if drafted else []
    head += ["first token s", "read/token", "GB/s", "device", "process", "load peak"]
    head += ["load s", "same text"]
    lines = []
    for one in found:
        cells = [one.engine, str(one.batch), str(one.rounds)]
        cells += [_with_range(one.s_per_token, ".3f"), _with_range(one.tokens_per_s, ".2f")]
        ratios = [one.faster, one.faster_drafted] if drafted else [one.faster]
        cells += [_with_range(ratio, ".2f") for ratio in ratios]
        cells += [
            _number(one.ttft_s, ".2f"),
            "-" if (moved := one.read_bytes_per_token) is None else format_size(moved.median),
            _number(one.read_bytes_per_s, ".2f", 1e9),
            format_size(one.device_peak_bytes),
            format_size(one.host_peak_bytes),
            format_size(one.load_peak_bytes),
            _number(one.load_s, ".1f"),
            "-" if one.engine == OURS else f"{one.same} of {one.compared}",
        ]
        lines.append(cells)
    return "## Engines\n\n" + table(head, lines)


def _warnings(raw: RawRows, found: Sequence[Summary]) -> str:
    """What makes numbers doubtful: weights that were in memory although they must not be."""
    lines = []
    cap, much = raw.setup.cap_bytes, raw.setup.weights_bytes * _CACHED_SHARE
    for one in found:
        who = f"{one.engine}, batch {one.batch}"
        if cap is not None and one.host_peak_bytes > cap:
            lines.append(
                f"{who} had {format_size(one.host_peak_bytes)} in memory, more than the cap: "
                "pages of the model's files that another process has cached count there. Run it "
                "again while nothing else reads them."
            )
        if one.cached_bytes is not None and one.cached_bytes > much:
            lines.append(
                f"{who} began with {format_size(one.cached_bytes)} of the model's files in the "
                "page cache: another process has them mapped."
            )
    return f"## Doubtful\n\n{bullets(lines)}" if lines else ""


def _best(found: Sequence[Summary]) -> str:
    """Who makes most tokens a second with each batch size; ours or not."""
    batches = sorted({summary.batch for summary in found})
    if len(batches) < 2:
        return ""
    lines = []
    for batch in batches:
        known = [
            (one.tokens_per_s.median, one.engine)
            for one in found
            if one.batch == batch and one.tokens_per_s
        ]
        for rate, engine in sorted(known, reverse=True)[:1]:
            lines.append([str(batch), engine, f"{rate:.2f}"])
    return "## Most tokens a second\n\n" + table(["batch", "engine", "tokens/s"], lines)


def _failures(raw: RawRows) -> str:
    rows = raw.failures()
    if not rows:
        return ""
    lines = [
        [
            row.run.engine,
            str(row.run.batch),
            str(row.run.round + 1),
            row.stage,
            " ".join(row.reason.split()),
        ]
        for row in rows
    ]
    made = table(["engine", "batch", "round", "while", "reason"], lines)
    return f"## Not run\n\n{made}\n\nAn engine that failed is not tried again with that batch."


def _prompts(raw: RawRows) -> str:
    engines = [name for name in raw.setup.engines if any(_per_prompt(raw, name))]
    head = ["prompt", "tokens", *engines]
    lines = []
    for number, prompt in enumerate(raw.setup.prompts):
        figures = [per_prompt(raw, engine, number) for engine in engines]
        cells = [_with_range(figure, ".3f") for figure in figures]
        lines.append([prompt.name, str(prompt.tokens), *cells])
    return "## Prompts: s/token, batch 1\n\n" + table(head, lines)


def _per_prompt(raw: RawRows, engine: str) -> list[Figure | None]:
    return [per_prompt(raw, engine, number) for number in range(len(raw.setup.prompts))]


def _differences(raw: RawRows) -> str:
    found = differences(raw)
    if not found:
        return ""
    head = ["engine", "batch", "prompt", "token", OURS, "the engine", "logits"]
    lines = []
    for one in found:
        name = raw.setup.prompts[one.prompt].name
        texts = [_around(text, one.texts) for text in one.texts]
        cells = [one.engine, str(one.batch), name, str(one.index), *texts, _gap(one)]
        lines.append(cells)
    return (
        f"## Different texts\n\n{table(head, lines)}\n\n"
        "token: index of the first that differs. logits: of our token and theirs in a pass of "
        "ours over what both agree on; tokens within a step or two of the number format are a tie "
        "that sums rounded in another order decide."
    )


def _around(text: str, both: tuple[str, str]) -> str:
    """A text from a little before the place where the two part."""
    pairs = enumerate(zip(*both, strict=False))
    parting = next((i for i, (a, b) in pairs if a != b), min(map(len, both)))
    start = max(0, parting - _SHOWN_CHARACTERS // 2)
    piece = text[start : start + _SHOWN_CHARACTERS]
    return ("..." if start else "") + piece


def _gap(one: Difference) -> str:
    if one.gap is None:
        return "-"
    ours, theirs = one.gap.logits
    near = ", near" if abs(ours - theirs) <= _NEAR else ""
    return f"{ours:.3f}, {theirs:.3f}{near}"


def _configurations(raw: RawRows) -> str:
    blocks = [
        f"{in_markdown(row.run.engine)}, batch {row.run.batch}:\n\n"
        f"```json\n{json.dumps(row.facts, indent=1)}\n```"
        for row in _first_loads(raw)
    ]
    return "\n\n".join(["## Configurations", *blocks])


def _first_loads(raw: RawRows) -> list[Loaded]:
    first: dict[tuple[str, int], Loaded] = {}
    for row in raw.loads():
        first.setdefault((row.run.engine, row.run.batch), row)
    return list(first.values())


_LEGEND = (
    "All numbers are measured; each can be found in `raw.jsonl` by engine, batch and round. "
    "s/token and tokens/s are of the passes after the prompt's: medians over prompts, then median "
    "of the rounds with the lowest and the highest round in brackets. is faster: their time per "
    "token over ours, paired by round and prompt. first token: the prompts' pass. read/token and "
    "GB/s: from disks after the first token. device, process: peak memory while answering; load "
    "peak: of the process before that. load: from the request to being ready, without imports, "
    "weights not in the page cache."
)


def _with_range(figure: Figure | None, form: str) -> str:
    if figure is None:
        return "-"
    text = format(figure.median, form)
    if figure.low == figure.high:
        return text
    return f"{text} ({format(figure.low, form)}-{format(figure.high, form)})"


def _number(figure: Figure | None, form: str, unit: float = 1.0) -> str:
    return "-" if figure is None else format(figure.median / unit, form)
