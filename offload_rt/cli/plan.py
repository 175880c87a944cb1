"""`offload-run plan`: what would live where, from headers alone; needs no torch."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from offload_rt.cli import options
from offload_rt.cli.columns import hanging
from offload_rt.cli.console import quiet_libraries
from offload_rt.cli.headline import (
    More,
    headline,
    more_memory,
    pinning_line,
    prediction_record,
    quantised_lines,
    split_lines,
)
from offload_rt.cli.options import Output, draft_of, runtime_of
from offload_rt.cli.plan_experts import (
    ExpertOutlook,
    expert_lines,
    expert_outlook,
    ways_record,
    why_whole,
)
from offload_rt.cli.plan_option import with_plan
from offload_rt.cli.plan_speed import speed_lines
from offload_rt.cli.plan_timeline import check_picture, timeline_lines, write_picture
from offload_rt.config import DraftConfig, RuntimeConfig, SamplingConfig, Wire
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory, Speeds
from offload_rt.costs.pass_cost import Limit
from offload_rt.costs.sizes import StoredSizes, process_bytes, stored_sizes
from offload_rt.costs.step import Prediction
from offload_rt.device.kinds import DeviceKind, check_links, likely_kind, named_devices
from offload_rt.device.system import free_memory_bytes
from offload_rt.errors import CheckpointError, DeviceError
from offload_rt.kv.sizes import KVPlan
from offload_rt.model.checkpoint import Checkpoint, resolve_model
from offload_rt.model.layout import compute_dtype
from offload_rt.model.outline import open_or_outline
from offload_rt.model.wire import as_if_packed, wired
from offload_rt.nodes.roster import Roster, read_roster
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.placement import Placement
from offload_rt.planning.plan_file import plan_file, write_plan
from offload_rt.planning.planner import Plan, plan_wires
from offload_rt.planning.striping import smallest_limits
from offload_rt.session.early import check_context
from offload_rt.session.means import check_plan, means_for, speeds_for, with_nodes
from offload_rt.session.opening import AUTO_CONTEXT_TOKENS
from offload_rt.session.summary import (
    bound_by,
    home_words,
    layer_words,
    retrieval_weights_name,
    weights_name,
)
from offload_rt.speculative.draft_model.pair import open_draft_checkpoint
from offload_rt.speculative.kinds import kind_of
from offload_rt.speculative.medusa.checkpoint import heads_bytes, open_draft_heads
from offload_rt.streaming.direct_io import BUFFERED, reads_directly
from offload_rt.text.files import check_tokenizer_files
from offload_rt.trace import Lane, TraceEvent
from offload_rt.units import format_size

_FEW_CHARS = 24

_log = logging.getLogger(__name__)


@click.command()
@click.argument("model")
@options.placement_options
@options.wire_option
@options.draft_options
@options.plan_options
@options.nodes_option
@options.together_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    show_default="none",
    help="File to write the plan to, for --plan of this and other verbs.",
)
@click.option(
    "--timeline",
    type=click.Path(path_type=Path),
    default=None,
    show_default="none",
    help="File to draw one step in, as it is simulated: .html, .png, or .json for "
    "https://ui.perfetto.dev.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show a step as text, too; log to stderr.")
@options.json_option
def plan(model: str, **values: Any) -> int:  # noqa: ANN401
    """Show what would live where, who would draft, and how fast that should be.

    Reads configuration and headers only; without weights config.json suffices. --context auto
    is that of `chat`: 4096 tokens, or what the model was made for if that is less; the whole of it
    is counted as one prompt. Answers are assumed to be greedy.
    """
    quiet_libraries(Output(json=values["json"], verbose=values["verbose"]))
    if values["timeline"] is not None:
        check_picture(values["timeline"])
    values, given = with_plan(values)
    config = runtime_of(values)
    checkpoint, from_files = open_or_outline(resolve_model(model))
    if config.wire is Wire.LOSSLESS and not from_files:
        checkpoint = as_if_packed(checkpoint)
    checkpoint = wired(checkpoint, config.wire)
    if from_files:
        _note_tokenizer(checkpoint)
    check_plan(given, checkpoint)
    roster = None if values["nodes"] is None else read_roster(values["nodes"])
    if roster is not None:
        config = roster.runtime(config)
    outlook = _look_ahead(
        checkpoint, config, draft_of(values), values["profile"], roster, values["sequences"]
    )
    if from_files and outlook.placement.reads_files:
        _note_buffered(checkpoint, outlook.placement)
    if values["output"] is not None:
        write_plan(values["output"], plan_file(checkpoint, outlook.plan))
    if values["timeline"] is not None:
        title = f"{checkpoint.name} on {outlook.speeds.profile.name}, simulated"
        write_picture(values["timeline"], outlook.events, title)
    if values["json"]:
        click.echo(json.dumps(_as_json(outlook)))
    else:
        click.echo(_as_table(outlook))
        if values["verbose"]:
            click.echo("\n".join(timeline_lines(outlook.events)))
    return 0


def _note_tokenizer(checkpoint: Checkpoint) -> None:
    """Say now what `generate` would refuse the model's tokenizer for; a plan needs none."""
    try:
        check_tokenizer_files(checkpoint.folder)
    except CheckpointError as error:
        _log.warning("no text can be generated as it is: %s", error)


def _note_buffered(checkpoint: Checkpoint, placement: Placement) -> None:
    """Say where passes will read through the page cache; as a run does."""
    if not all(map(reads_directly, checkpoint.files)):
        _log.warning(BUFFERED, "experts" if placement.expert_slots else "streamed layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Busy:
    """What a machine does in a step: seconds that its link and its kernels are busy."""

    link_s: float
    kernels_s: float

    @property
    def in_words(self) -> str:
        limit = Limit.TRANSFER if self.link_s >= self.kernels_s else Limit.COMPUTE
        return (
            f"; {self.link_s:.3f} s of transfer and {self.kernels_s:.3f} s of kernels in a pass: "
            f"{limit} binds"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outlook:
    """A placement, what it was made from, and what more memory would give."""

    checkpoint: Checkpoint
    plan: Plan
    speeds: Speeds
    device: DeviceKind
    context_tokens: int
    more: More | None

    @property
    def config(self) -> RuntimeConfig:
        return self.plan.runtime

    @property
    def drafting(self) -> Drafting:
        return self.plan.drafting

    @property
    def placement(self) -> Placement:
        return self.plan.placement

    @property
    def stored(self) -> StoredSizes | None:
        return stored_sizes(self.checkpoint, self.config.dtype, self.device)

    @property
    def prediction(self) -> Prediction:
        assert self.plan.prediction is not None  # there are speeds
        return self.plan.prediction

    @property
    def experts(self) -> ExpertOutlook | None:
        """What is expected of experts that come one by one."""
        return expert_outlook(self.checkpoint, self.plan, self.device)

    @property
    def whole_because(self) -> str:
        """Why the layers of a mixture of experts are streamed whole; empty where none are."""
        if not self.checkpoint.has_experts or not self.placement.streamed:
            return ""
        return why_whole(self.checkpoint, self.plan, self.device)

    @property
    def events(self) -> list[TraceEvent]:
        """What the streams are busy with in one of the first steps."""
        plan = self.plan
        assert plan.placed is not None  # there are speeds
        return plan.placed.events(plan.first, plan.expected)

    @property
    def busy(self) -> dict[str, "_Busy"]:
        """How long each machine's link and kernels are, where there are several machines."""
        events, names = self.events if self.config.machines else [], self.config.machines

        def seconds(lane: Lane, number: int) -> float:
            mine = [event for event in events if event.lane == f"{lane} {number}"]
            return sum(event.end_s - event.start_s for event in mine)

        return {
            name: _Busy(link_s=seconds(Lane.COPY, n), kernels_s=seconds(Lane.COMPUTE, n))
            for n, name in enumerate(names)
        }

    @property
    def smallest_limits(self) -> tuple[int, ...]:
        """The lowest limits of the devices under which it runs, of one with any drafter."""
        config = self.config
        if not self.placement.shares:
            return (self.plan.smallest_bytes,)
        if config.resident is not None:
            return tuple(own.device_bytes for own in self.placement.shares)
        return smallest_limits(
            self.placement,
            slots=config.slots,
            resident_layers=config.resident_layers,
            expert_slots=config.expert_slots,
        )

    @property
    def dtype(self) -> str:
        return compute_dtype(self.checkpoint, self.config.dtype)

    @property
    def home(self) -> str:
        return str(self.placement.home)


def _look_ahead(
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    draft: DraftConfig,
    profile: str | None,
    roster: Roster | None = None,
    sequences: int = 1,
) -> _Outlook:
    longest = checkpoint.config.max_positions
    context = config.context_tokens or min(longest, AUTO_CONTEXT_TOKENS)
    check_context(checkpoint, context)
    device, free = device_there(config)
    heads = open_draft_heads(checkpoint, draft)
    nbytes = heads_bytes(heads, checkpoint, config.dtype, device, sequences)
    drafter = open_draft_checkpoint(checkpoint, draft, runs=False)
    drafting = Drafting(draft, drafter, nbytes)
    load = RunLoad.alike(sequences, context, drafting)
    speeds = speeds_for(profile, device, config.device if roster is None else "auto")
    if roster is not None:
        speeds = with_nodes(speeds, roster, profile, device)
        free = _free_there(free, speeds, config, roster)
    means = means_for(checkpoint, SamplingConfig(), speeds, draft)
    asked = checkpoint
    checkpoint, found = plan_wires(asked, config, device, load=load, free=free, means=means)
    assert found.prediction is not None  # there are speeds

    def predict(roomy: RuntimeConfig, there: FreeMemory) -> float:
        _, made = plan_wires(asked, roomy, device, load=load, free=there, means=means)
        assert made.prediction is not None
        return made.prediction.s_per_token

    return _Outlook(
        checkpoint=checkpoint,
        plan=found,
        speeds=speeds,
        device=device,
        context_tokens=context,
        more=more_memory(
            config, device, free, (found.placement, found.prediction.s_per_token), predict
        ),
    )


def _free_there(
    free: FreeMemory, speeds: Speeds, config: RuntimeConfig, roster: Roster
) -> FreeMemory:
    """What is free here, with all memory of the other machines, or what they are limited to."""
    nodes = zip(speeds.further, config.each_device()[1:], roster.nodes[1:], strict=True)
    there = [(own.free, part.only_limit_bytes, node.host_bytes) for own, part, node in nodes]
    return dataclasses.replace(
        free,
        host_bytes=roster.nodes[0].host_bytes or free.host_bytes,
        further_bytes=tuple(limit or own.device_bytes for own, limit, _ in there),
        further_host_bytes=tuple(host or own.host_bytes for own, _, host in there),
    )


def device_there(config: RuntimeConfig) -> tuple[DeviceKind, FreeMemory]:
    """The kind of device a run would compute on, and what is free there and on the host."""
    if config.machines:
        config = config.each_device()[0]
    check_links(config)
    host, count = free_memory_bytes(), len(config.device_names)
    automatic = config.device == "auto"
    kind, indices = (likely_kind("auto"), (0,)) if automatic else named_devices(config.device)
    limits = [one.only_limit_bytes for one in config.each_device()]
    free = kind.free_bytes() if kind.own_memory else [host // count]
    there = []
    for index, limit in zip(indices, limits, strict=True):
        if kind.own_memory and limit is None and index >= len(free):
            raise DeviceError(
                f"--device {config.device}: no such {kind.noun} here; "
                "to plan for one, give --device-memory"
            )
        there.append(limit if kind.own_memory and limit is not None else free[index])
    return kind, FreeMemory(device_bytes=there[0], host_bytes=host, further_bytes=tuple(there[1:]))


def _as_json(outlook: _Outlook) -> dict[str, Any]:
    placement, checkpoint, busy = outlook.placement, outlook.checkpoint, outlook.busy
    placed = outlook.plan.placed
    return {
        "model": str(checkpoint.folder),
        "family": checkpoint.config.model_type,
        "weights_read": bool(checkpoint.files),
        "weights_bytes": checkpoint.total_bytes,
        "weights_file_bytes": checkpoint.file_bytes,
        "dtype": outlook.dtype,
        "wire": str(outlook.config.wire),
        "quantised": dataclasses.asdict(outlook.stored) if outlook.stored else None,
        "device": str(outlook.device.processor),
        "home": outlook.home,
        "context_tokens": outlook.context_tokens,
        "sequences": outlook.plan.sequences,
        "resident": list(placement.resident),
        "streamed": list(placement.streamed),
        "drafter": outlook.drafting.config.draft,
        "draft_tokens": outlook.drafting.config.nodes,
        "first_draft_tokens": outlook.plan.first_nodes,
        "draft_window": outlook.drafting.config.window_tokens,
        "draft_weights": weights_name(outlook.drafting.config),
        "retrieval_weights": retrieval_weights_name(outlook.drafting.config),
        "drafter_bytes": placement.drafter_bytes,
        "recorded_bytes": placement.demand.recorded_bytes,
        "slots": placement.slots,
        "slot_bytes": placement.slot_bytes,
        "experts": None if outlook.experts is None else dataclasses.asdict(outlook.experts),
        "whole_because": outlook.whole_because,
        "ways": ways_record(outlook.plan),
        "resident_bytes": placement.resident_bytes,
        "base_bytes": placement.base_bytes,
        "host_base_bytes": placement.demand.host_base_bytes,
        "file_base_bytes": placement.demand.file_base_bytes,
        "kv": str(demand.kv.place) if (demand := placement.demand).kv else "device",
        "kv_bytes": placement.kv_bytes,
        "state_bytes": sum(demand.state_bytes),
        "workspace_bytes": placement.workspace_bytes,
        "context_bytes": placement.context_bytes,
        "slack_bytes": placement.slack_bytes,
        "device_bytes": placement.device_bytes,
        "device_limit_bytes": placement.device_limit_bytes,
        "devices": [
            {
                "name": stripe.name,
                "resident": list(own.resident),
                "streamed": list(own.streamed),
                "slots": own.slots,
                "kv_bytes": own.demand.kv_bytes,
                "device_bytes": own.device_bytes,
                "device_limit_bytes": own.device_limit_bytes,
                "busy": dataclasses.asdict(busy[stripe.name]) if busy else None,
            }
            for own, stripe in zip(placement.shares, placement.stripes, strict=True)
        ],
        "smallest_device_bytes": sum(outlook.smallest_limits),
        "process_bytes": _process_bytes(outlook),
        "bytes_per_pass": outlook.prediction.bytes_per_pass,
        "host_bytes": placement.host_bytes,
        "host_pinned_bytes": outlook.speeds.pinned_bytes(outlook.config, placement.host_bytes),
        "profile": outlook.speeds.profile.name,
        "own_profile": outlook.speeds.own,
        "level": outlook.plan.level,
        "levels": dataclasses.asdict(placed.speeds.levels) if placed else None,
        "predicted": prediction_record(outlook.prediction),
        "more_memory": dataclasses.asdict(outlook.more) if outlook.more else None,
        "considered": [
            {
                "draft": c.draft.draft,
                "draft_tokens": c.draft.nodes,
                "predicted": prediction_record(c.prediction) if c.prediction else None,
                "refusal": c.refusal,
            }
            for c in outlook.plan.considered
        ],
    }


def _tokens_kept(outlook: _Outlook) -> str:
    count = outlook.plan.sequences
    each = f" of each of {count} sequences" if count > 1 else ""
    return f"{outlook.context_tokens} tokens{each}"


def _kv_home(kv: KVPlan | None) -> str:
    if kv is None:
        return ""
    size = format_size(sum(sizes.home_bytes for sizes in kv.sizes))
    home = f", {size} of it in {'host memory' if kv.host_bytes else 'a file'}"
    if kv.attend_on_host:
        return home
    ring = sum(sizes.slots for sizes in kv.sizes)
    return f"{home}, read through {ring} blocks of {format_size(kv.sizes[0].slot_bytes)}"


def _process_bytes(outlook: _Outlook) -> int:
    """What a run takes besides, where the device's memory is the process's; it was measured."""
    return 0 if outlook.device.own_memory else process_bytes()


def _head_order(placement: Placement) -> str:
    if not placement.packs_head:
        return ""
    return f"{format_size(placement.demand.packed_head_bytes)} of it the head reordered"


def _as_table(outlook: _Outlook) -> str:
    placement, checkpoint, experts = outlook.placement, outlook.checkpoint, outlook.experts
    busy = outlook.busy
    demand = placement.demand
    rows = [
        (
            "head" if demand.rows_apart else "embedding, head",
            placement.base_bytes,
            _head_order(placement),
        ),
        _layers("resident", placement.resident, placement.streamed, placement.resident_bytes),
        ("KV cache", placement.kv_bytes, f"{_tokens_kept(outlook)}{_kv_home(demand.kv)}"),
        *placement.taken_rows,
    ]
    if states := sum(demand.state_bytes):
        rows.insert(3, ("recurrent states", states, "with the newest inputs, whatever the context"))
    if placement.slots:
        each = f"{placement.slots} of {format_size(placement.slot_bytes)}"
        each += " on each device" if placement.shares else ""
        rows.insert(2, ("slots", placement.ring_bytes, each))
    if experts is not None:
        each = f"{experts.slots} of {format_size(experts.slot_bytes)}, {experts.share:.0%} of all"
        rows.insert(2, ("slots for experts", placement.pool_bytes, each))
    rows += _drafting_rows(outlook.drafting, placement)
    limit = format_size(placement.device_limit_bytes)
    rows.append(("total", placement.device_bytes, f"the limit is {limit}"))
    for own, stripe in zip(placement.shares, placement.stripes, strict=True):
        there = busy[stripe.name].in_words if stripe.name in busy else ""
        rows.append((stripe.name, own.device_bytes, f"{own.in_words}{there}"))
    least = outlook.smallest_limits
    typed = ",".join(f"{-(-limit // 2**20)}MiB" for limit in least)  # up: it must work
    rows.append(("smallest", sum(least), f"--device-memory {typed} works too"))
    if beside_bytes := _process_bytes(outlook):
        beside = "beside the total: Python, torch, the tokenizer"
        rows.append(("the process", beside_bytes, beside))
    source = "" if checkpoint.files else " (from config.json alone)"
    if checkpoint.file_bytes < checkpoint.total_bytes:
        source = f" (packed in {format_size(checkpoint.file_bytes)}, bit for bit)"
    if experts is not None:
        source += f", {format_size(experts.active_bytes)} of it active"
    head = (
        f"{checkpoint.name}: {checkpoint.config.model_type}, "
        f"{format_size(checkpoint.total_bytes)}{source}, {checkpoint.config.num_layers} layers, "
        f"computed in {outlook.dtype}"
    )
    lines = [
        *_headline(outlook),
        hanging(head, 2),
        *quantised_lines(outlook.stored),
        f"on the device ({outlook.device.processor})",
        *map(_row, rows),
        *_home_lines(outlook),
    ]
    return "\n".join([*lines, *speed_lines(outlook.plan, outlook.speeds)])


def _home_lines(outlook: _Outlook) -> list[str]:
    """What is elsewhere, and how it comes."""
    placement, experts = outlook.placement, outlook.experts
    away = home_words(placement.home)
    rows_of = []
    demand = placement.demand
    if apart := demand.host_base_bytes + demand.file_base_bytes:
        where = "host memory" if demand.host_base_bytes else "its file"
        detail = f"read from {where}, a row for each token of a pass"
        rows_of = [_row(("embedding", apart, detail))]
    if experts is not None:
        return [*expert_lines(experts, away), *rows_of]
    if not placement.streamed:
        return ["nothing is streamed", *rows_of]
    nbytes = outlook.prediction.home_bytes
    streamed = _layers("streamed", placement.streamed, placement.resident, nbytes)
    pinned = outlook.speeds.pinned_bytes(outlook.config, placement.host_bytes)
    why = outlook.whole_because
    return [
        f"in {away}, copied to the device in each pass",
        _row(streamed),
        *(hanging(line, 4) for line in split_lines(placement)),
        *rows_of,
        *(hanging(line, 4) for line in pinning_line(placement.host_bytes, pinned)),
        *([hanging(f"  layers are streamed whole: {why}", 4)] if why else []),
    ]


def _drafting_rows(drafting: Drafting, placement: Placement) -> list[tuple[str, int, str]]:
    """The device memory of a drafter, if it needs any."""
    config, nbytes = drafting.config, placement.drafter_bytes
    if not config.drafts:
        return []
    kind = kind_of(config.kind)
    parts = list(kind.in_memory(config)) if nbytes else []
    if drafting.checkpoint is not None:
        parts.append(f"{drafting.checkpoint.name} and its KV cache")
    if recorded := placement.demand.recorded_bytes:
        parts.append(f"{format_size(recorded)} of it recorded passes")
    return [(kind.label, nbytes, "; ".join(parts))] if parts else []


def _headline(outlook: _Outlook) -> list[str]:
    prediction, name = outlook.prediction, outlook.checkpoint.name
    bound = bound_by(prediction.limit, outlook.placement)
    return [hanging(headline(name, prediction.s_per_token, bound, outlook.more), 2)]


def _layers(
    kind: str, layers: Sequence[int], others: Sequence[int], nbytes: int
) -> tuple[str, int, str]:
    """A row about layers; `--json` has their numbers."""
    which = layer_words(layers)
    if len(layers) > len(others) > 0 and len(which) > _FEW_CHARS:
        which = "the others"
    return f"{len(layers)} {kind} layers", nbytes, which


def _row(cells: tuple[str, int, str]) -> str:
    what, nbytes, detail = cells
    head = f"  {what:<20}{format_size(nbytes):>9}  "
    return hanging(f"{head}{detail}".rstrip(), len(head))
