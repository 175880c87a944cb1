"""`offload-run compare`: side by side with other runtimes, each in its own process."""

import dataclasses
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from offload_rt.baselines.cap import CapKind, find_cap
from offload_rt.baselines.comparison import Comparison, Conditions
from offload_rt.baselines.engines import EngineSpec, choose_engines, python_of, read_pythons
from offload_rt.baselines.rows import GpuRow, MachineRow, PromptRow, RawRows, Setup, begin, read
from offload_rt.cli import options
from offload_rt.cli.compare_chart import draw
from offload_rt.cli.compare_report import as_json, as_markdown
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.held import held
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import Output, draft_of, runtime_of
from offload_rt.cli.prompt_set import PromptItem, read_prompt_set, spread
from offload_rt.config import DraftConfig, RuntimeConfig
from offload_rt.costs.sizes import kv_bytes_per_token
from offload_rt.device.cuda.nvml import find_driver
from offload_rt.device.kinds import likely_kind
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.model.layout import compute_dtype
from offload_rt.model.packed_files import refuse_packed
from offload_rt.profiling.identity import this_machine
from offload_rt.session.adapters import refuse_beside
from offload_rt.session.opening import Model, check_drafter, context_limit, open_model
from offload_rt.units import format_size
from offload_rt.writing import make_folder, write_text

RAW, REPORT, RECORD, CHART = "raw.jsonl", "report.md", "report.json", "chart.png"
_REST_BYTES = 2 * 2**30  # of a process besides --device-memory: libraries, reading ahead, KV
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@click.command()
@click.argument("model", required=False)
@click.option(
    "--against",
    default="deepspeed,accelerate,transformers",
    help="Runtimes to compare with, by commas: deepspeed (on NVMe and in host memory; or "
    "deepspeed-nvme, deepspeed-cpu), accelerate, transformers (with --draft model:MODEL assisted "
    "by it too).",
)
@click.option(
    "--output",
    "directory",
    default=None,
    show_default="none",
    help=f"Folder for {REPORT}, {RECORD}, {CHART}, logs and {RAW}, from which a comparison that "
    "was interrupted goes on; swap files are made in it meanwhile.",
)
@click.option(
    "--report-only",
    "report_only",
    default=None,
    show_default="none",
    help=f"Folder with {RAW}: make its report again and measure nothing.",
)
@options.optional_prompt_set_options
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    help="Times every engine answers every prompt, in turns; the report has medians.",
)
@click.option(
    "--batch",
    "batches",
    default="1",
    help="Numbers of prompts that run at once, by commas: 1,4,16,64.",
)
@click.option(
    "--memory-cap",
    "cap_bytes",
    type=options.SIZE,
    default=None,
    show_default="on the CPU --device-memory and 2GiB, with a GPU none",
    help="Host memory an engine's process may take in all, page cache included.",
)
@click.option(
    "--engine-python",
    "engine_pythons",
    multiple=True,
    show_default="made by tools/setup_baselines.sh, else this Python",
    help="Python of an engine's environment, as deepspeed=PATH; may be given several times.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=1800.0,
    help="Seconds an engine may take to load, and for each answer.",
)
@options.max_tokens_option
@options.ignore_eos_option
@options.system_option
@options.raw_option
@options.draft_options
@options.placement_options
@options.json_option
@options.output_options
@click.pass_obj
def compare(interrupts: Interrupts, model: str | None, **values: Any) -> int:  # noqa: ANN401
    """Compare with DeepSpeed ZeRO-Inference, accelerate and transformers.

    Each engine runs in its own process below the same limits, in rounds that take turns, greedily,
    with the same prompt tokens. Prints the report on stdout. Placement and drafting options are
    ours; others get what --device-memory and --memory-cap allow. Ctrl-C leaves the rows measured so
    far in --output, exit code 130; the same command goes on.
    """
    output = Output(json=values["json"], verbose=values["verbose"], quiet=values["quiet"])
    quiet_libraries(output)
    console = Console(output)
    if (folder := values["report_only"]) is not None:
        if model is not None or values["directory"] is not None:
            raise ConfigError("--report-only needs the rows of its folder only: leave out the rest")
        _report(read(Path(folder) / RAW), Path(folder), console)
        return 0
    interrupted = False
    with ExitStack() as undo:
        job = _prepare(model, values, console, undo)
        try:
            job.run(values["rounds"])
        except Interrupted:
            interrupted = True
            console.note(f"interrupted: {len(job.raw.rows)} rows are in {job.raw.path}")
        _report(job.raw, job.folder, console)
    if interrupted:
        return interrupts.exit_code
    if (failures := job.raw.failures()) and not job.raw.answers():
        first = failures[0]
        raise ConfigError(f"nothing was measured: {first.run.engine}: {first.reason}")
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A command line, read."""

    runtime: RuntimeConfig
    draft: DraftConfig
    engines: list[EngineSpec]
    batches: list[int]
    device_bytes: int
    cap_bytes: int | None


def _prepare(
    model: str | None, values: Mapping[str, Any], console: Console, undo: ExitStack
) -> Comparison:
    """Check everything before anything is measured, then open the rows."""
    for name, flag in (("model", "MODEL"), ("directory", "--output"), ("prompts", "--prompts")):
        if (model if name == "model" else values[name]) is None:
            raise ConfigError(f"{flag} is missing: give it, or --report-only FOLDER")
    asked = _asked(values)
    pythons = read_pythons(values["engine_pythons"], asked.engines)
    assert model is not None  # checked above
    checkpoint = open_checkpoint(resolve_model(model))
    refuse_beside(checkpoint.folder, "which transformers applies and compare does not know")
    refuse_packed(checkpoint.folder, "which other runtimes do not read")
    items = spread(read_prompt_set(values["prompts"]), values["limit"])
    folder = make_folder(Path(os.path.abspath(values["directory"])), REPORT, RECORD, CHART)
    undo.enter_context(held(folder, "--output"))
    opened = open_model(checkpoint, runtime_of(values), console, runs=False)
    check_drafter(opened, asked.draft, raw=values["raw"])
    prompts = _encoded(opened, items, values)
    cap = find_cap(asked.cap_bytes)
    setup = _setup(opened, asked, cap, items, prompts, values)
    conditions = _conditions(opened, asked, prompts, values)
    return Comparison(
        conditions=conditions,
        raw=begin(folder / RAW, setup),
        engines=asked.engines,
        pythons={spec.name: python_of(spec, pythons) for spec in asked.engines},
        cap=cap,
        folder=folder,
        say=console.note,
    )


def _asked(values: Mapping[str, Any]) -> _Asked:
    runtime, draft = runtime_of(values), _drafter(values)
    device_bytes = runtime.only_limit_bytes
    if device_bytes is None:
        raise ConfigError("--device-memory is missing: give what every engine may use")
    kind = likely_kind(runtime.device)
    if runtime.device in ("auto", kind.processor):
        first = f"{kind.processor}:0" if kind.numbered else str(kind.processor)
        runtime = dataclasses.replace(runtime, device=first)
    cap_bytes = values["cap_bytes"]
    if not kind.own_memory:
        cap_bytes = cap_bytes or device_bytes + _REST_BYTES
        if cap_bytes <= device_bytes:
            raise ConfigError(
                f"--memory-cap is {format_size(cap_bytes)}, on the CPU --device-memory "
                f"({format_size(device_bytes)}) is part of it: raise it"
            )
    return _Asked(
        runtime=runtime,
        draft=draft,
        engines=choose_engines(values["against"], draft),
        batches=_batches(values["batches"]),
        device_bytes=device_bytes,
        cap_bytes=cap_bytes,
    )


def _drafter(values: Mapping[str, Any]) -> DraftConfig:
    """Who drafts for the second engine of ours; nobody unless named, or `auto` is."""
    draft, source = draft_of(values), click.get_current_context().get_parameter_source("draft")
    return DraftConfig() if draft.automatic and source is not ParameterSource.COMMANDLINE else draft


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise ConfigError(f"--batch is {text}, accepted are numbers from 1 to 1024 by commas")
    return sorted({int(part) for part in parts})


def _encoded(
    model: Model, items: Sequence[PromptItem], values: Mapping[str, Any]
) -> list[list[int]]:
    """Token ids of all prompts, which have room for their answers."""
    from offload_rt.text import build_prompt

    if values["max_tokens"] < 2:
        raise ConfigError(
            f"--max-tokens is {values['max_tokens']}, accepted is 2 or more: time per token is "
            "measured after the first"
        )
    found = [
        build_prompt(model.tokenizer, item.text, system=values["system"], raw=values["raw"])
        for item in items
    ]
    longest, room = max(map(len, found)), context_limit(model, values["context_tokens"])
    if longest + values["max_tokens"] > room:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, with --max-tokens {values['max_tokens']} "
            f"more than the {room} that are possible: lower it, or take shorter prompts"
        )
    return found


def _setup(
    model: Model,
    asked: _Asked,
    cap: CapKind,
    items: Sequence[PromptItem],
    prompts: Sequence[Sequence[int]],
    values: Mapping[str, Any],
) -> Setup:
    checkpoint = model.checkpoint
    files = sorted((path.name, path.stat().st_size) for path in checkpoint.files)
    return Setup(
        model=model.name,
        files=[list(pair) for pair in files],
        dtype=_dtype(checkpoint, asked.runtime),
        device=asked.runtime.device,
        device_bytes=asked.device_bytes,
        cap_bytes=asked.cap_bytes,
        cap=cap.words,
        page_cache=_page_cache(checkpoint, asked, cap),
        prompt_file=Path(values["prompts"]).name,
        prompts=[
            PromptRow(
                name=item.name,
                category=item.category,
                tokens=len(ids),
                digest=hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16],
            )
            for item, ids in zip(items, prompts, strict=True)
        ],
        max_tokens=values["max_tokens"],
        ends=not values["ignore_eos"],
        draft=json.dumps(dataclasses.asdict(asked.draft)) if asked.draft.drafts else "",
        runtime=json.dumps(dataclasses.asdict(asked.runtime)),
        batches=asked.batches,
        engines=[spec.name for spec in asked.engines],
        machine=_machine(),
        weights_bytes=checkpoint.total_bytes,
        command=shlex.join(["offload-run", *sys.argv[1:]]),
    )


def _machine() -> MachineRow:
    found = this_machine(find_driver())
    gpus = [
        GpuRow(
            name=gpu.name,
            memory_bytes=gpu.memory_bytes,
            link_generation=gpu.link_generation,
            link_width=gpu.link_width,
        )
        for gpu in found.gpus
    ]
    return MachineRow(cpu=found.cpu, cores=found.cores, ram_bytes=found.ram_bytes, gpus=gpus)


def _page_cache(checkpoint: Checkpoint, asked: _Asked, cap: CapKind) -> str:
    """What keeps weights from being served from it, in words."""
    dropped = "the model's files are dropped from it before each process"
    if not cap.counts_page_cache or asked.cap_bytes is None:
        return f"{dropped}; nothing limits it afterwards: see the bytes read from disks"
    streamed = checkpoint.total_bytes - asked.device_bytes
    rest = asked.cap_bytes - asked.device_bytes
    if not likely_kind(asked.runtime.device).own_memory and streamed > rest:
        return (
            f"{dropped}; it counts towards the cap, which leaves {format_size(rest)} besides the "
            f"device memory for {format_size(streamed)} of streamed weights"
        )
    return (
        f"{dropped}; it counts towards the cap, but weights that are not on the device may fit "
        "there: see the bytes read from disks"
    )


def _conditions(
    model: Model, asked: _Asked, prompts: Sequence[Sequence[int]], values: Mapping[str, Any]
) -> Conditions:
    checkpoint, tokenizer = model.checkpoint, model.tokenizer
    dtype = _dtype(checkpoint, asked.runtime)
    item_bytes = _ITEM_BYTES[dtype]
    sizes = [[item_bytes * prod(e.shape) for e in layer] for layer in checkpoint.layers]
    runtime = dataclasses.asdict(asked.runtime)
    assisting = "" if asked.draft.over_retrieval else asked.draft.model
    return Conditions(
        model=checkpoint.folder,
        files=list(checkpoint.files),
        prompts=prompts,
        max_tokens=values["max_tokens"],
        end_tokens=[] if values["ignore_eos"] else sorted(model.end_tokens),
        load={
            "dtype": dtype,
            "item_bytes": item_bytes,
            "device": asked.runtime.device,
            "device_bytes": asked.device_bytes,
            "cap_bytes": asked.cap_bytes,
            "host_bytes": asked.cap_bytes or this_machine(None).ram_bytes,
            "largest_layer_bytes": max(map(sum, sizes)),
            "largest_layer_tensor_bytes": max(map(max, sizes)),
            "tensors_per_layer": max(map(len, sizes)),
        },
        kv_bytes_per_token=kv_bytes_per_token(checkpoint.config, item_bytes),
        runtime=runtime,
        draft=dataclasses.asdict(asked.draft),
        no_draft=dataclasses.asdict(DraftConfig()),
        draft_model=os.path.abspath(resolve_model(assisting)) if assisting else None,
        decode=tokenizer.decode,
        timeout_s=values["timeout_s"],
    )


def _dtype(checkpoint: Checkpoint, runtime: RuntimeConfig) -> str:
    return compute_dtype(checkpoint, runtime.dtype)


def _report(raw: RawRows, folder: Path, console: Console) -> None:
    """Write the report beside the rows and print it."""
    if raw.torn_bytes:
        console.note(f"the last line of {raw.path} has no end and is left out")
    table, record = as_markdown(raw), json.dumps(as_json(raw))
    for name, text in ((REPORT, table), (RECORD, record)):
        write_text(folder / name, text + "\n")
    if (why := draw(raw, folder / CHART)) is not None:
        console.note(why)
    click.echo(record if console.output.json else table)
