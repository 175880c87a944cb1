"""A plan in words and numbers: what lives where, who drafts, how fast, and what binds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig, HomeKind, KVPlace
from offload_rt.planning.placement import Placement
from offload_rt.planning.planner import Plan, Prediction
from offload_rt.units import format_size, format_speed

if TYPE_CHECKING:
    from offload_rt.engine import Engine

_ORDINALS = {2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st", 32: "nd", 33: "rd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """What was planned for a model that is loaded; `print` shows it in a few lines.

    Attributes:
        context_tokens: of prompt and answer there is room for, per sequence.
        sequences: how many may run at once.
        drafter: as `draft` names it.
        draft_tokens: of a draft, at most; `first_draft_tokens` at first.
        resident: layers that stay on the device.
        streamed: layers that are copied to it in each pass.
        expert_slots: of the experts that come one by one; 0 where layers are whole.
        whole_layers: that have their experts in them where those of others come one by one.
        context_bytes: of `workspace_bytes`, what a GPU's driver takes.
        slack_bytes: of it, what allocators take beyond what they are asked for.
        home: where those live.
        bound_by: what most of a step's time is spent on.
        prediction: what a step should take; None for a model that only reads texts (`score`).
    """

    name: str
    device: str
    dtype: str
    context_tokens: int
    sequences: int
    drafter: str
    drafter_label: str
    draft_tokens: int
    first_draft_tokens: int
    draft_window: int | None
    draft_weights: str | None
    retrieval_weights: str | None
    drafter_bytes: int
    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    expert_slots: int
    whole_layers: tuple[int, ...]
    slots: int
    slot_bytes: int
    resident_bytes: int
    base_bytes: int
    bytes_per_pass: int
    kv: str
    kv_bytes: int
    workspace_bytes: int
    context_bytes: int
    slack_bytes: int
    device_bytes: int
    device_limit_bytes: int
    home: str
    bound_by: str | None
    prediction: Prediction | None

    @property
    def tokens_per_s(self) -> float | None:
        """Predicted speed of one sequence."""
        return None if self.prediction is None else 1.0 / self.prediction.s_per_token

    def __str__(self) -> str:
        layers = len(self.resident) + len(self.streamed)
        lines = [f"{self.name}, {self.dtype} on {self.device}"]
        if self.prediction is not None:
            speed = format_speed(self.prediction.s_per_token)
            lines[0] += f": {speed} predicted, bound by {self.bound_by}"
        if self.streamed:
            home = home_words(HomeKind(self.home))
            lines += [
                f"{len(self.resident)} of {layers} layers resident: {layer_words(self.resident)}"
                if self.resident
                else f"none of {layers} layers resident",
                f"{len(self.streamed)} streamed from {home}, {format_size(self.bytes_per_pass)} "
                f"per pass through {self.slots} of {format_size(self.slot_bytes)}",
            ]
        elif self.expert_slots:
            kept = f" of {layers - len(self.whole_layers)}" if self.whole_layers else ""
            lines.append(
                f"all {layers} layers resident but for the experts{kept}, which come one by one "
                f"through {self.expert_slots} slots"
            )
        else:
            lines.append(f"all {layers} layers resident")
        lines.append(
            f"KV of {self.context_tokens} tokens for each of {self.sequences} sequences "
            f"({self.kv}, {format_size(self.kv_bytes)} on the device)"
        )
        lines.append(f"drafting: {self.drafter_label}")
        lines.append(
            f"{format_size(self.device_bytes)} of {format_size(self.device_limit_bytes)} of device "
            "memory"
        )
        return "\n  ".join(lines)


def summary_of(engine: "Engine") -> PlanSummary:
    """The summary of an engine's plan."""
    plan, placement, draft = engine.plan, engine.placement, engine.draft
    demand, prediction = placement.demand, plan.prediction
    return PlanSummary(
        name=engine.checkpoint.name,
        device=engine.devices.name,
        dtype=dtype_name(engine),
        context_tokens=max(engine.capacities),
        sequences=engine.sequences,
        drafter=draft.draft,
        drafter_label=drafts_name(plan),
        draft_tokens=draft.nodes,
        first_draft_tokens=plan.first_nodes,
        draft_window=draft.window_tokens,
        draft_weights=weights_name(draft),
        retrieval_weights=retrieval_weights_name(draft),
        drafter_bytes=placement.drafter_bytes,
        resident=placement.resident,
        streamed=placement.streamed,
        expert_slots=placement.expert_slots,
        whole_layers=placement.whole_layers,
        slots=placement.slots,
        slot_bytes=placement.slot_bytes,
        resident_bytes=placement.resident_bytes,
        base_bytes=placement.base_bytes,
        bytes_per_pass=engine.bytes_per_pass,
        kv=str(demand.kv.place) if demand.kv else "device",
        kv_bytes=placement.kv_bytes,
        workspace_bytes=placement.workspace_bytes,
        context_bytes=placement.context_bytes,
        slack_bytes=placement.slack_bytes,
        device_bytes=placement.device_bytes,
        device_limit_bytes=placement.device_limit_bytes,
        home=str(placement.home),
        bound_by=bound_by(prediction.limit, placement) if prediction else None,
        prediction=prediction,
    )


def home_words(home: HomeKind) -> str:
    """Where streamed weights live, in the reader's words."""
    return {
        HomeKind.HOST: "host memory",
        HomeKind.SPLIT: "host memory and the model's files",
    }.get(home, "the model's files")


def bound_by(limit: str, placement: Placement) -> str:
    """What binds a prediction, in the reader's words."""
    if limit == "drafting":
        return "drafting"
    if limit == "latency":
        return "copying and computing in turn"
    if limit != "transfer":
        return "computing"
    if placement.streams:
        if placement.home is HomeKind.SPLIT:
            return "the disk and the link to host memory"
        return "the disk" if placement.home is HomeKind.DISK else "the link to host memory"
    kv = placement.demand.kv
    return "the disk, which holds the KV cache" if kv and kv.place is KVPlace.DISK else "the link"


def dtype_name(engine: "Engine") -> str:
    """The number format an engine computes in."""
    return str(engine.network.dtype).removeprefix("torch.")


def drafter_name(draft: DraftConfig) -> str:
    """Who drafts, in few words; a model by its folder's name, and how weights are rounded."""
    name = Path(draft.model or draft.heads or draft.module).name
    words = [draft.kind, *[f"({draft.retrieval.retrieval_weights})"] * draft.retrieval.rounded]
    rounds = draft.draft_weights.rounds
    return " ".join([*words, *[name] * bool(name), *[f"({draft.draft_weights})"] * rounds])


def drafts_name(plan: Plan) -> str:
    """Who drafts, how many tokens, and to how many a run may come."""
    name, first, most = drafter_name(plan.drafting.config), plan.first_nodes, plan.drafting
    if plan.watches:
        return f"none at first, {name} up to {most.config.nodes} tokens where they would pay"
    if not first:
        return name
    later = f" at first, up to {most.config.nodes}" if most.config.nodes > first else ""
    return f"{name}, {first} tokens{later}"


def weights_name(draft: DraftConfig) -> str | None:
    """How the weights are kept that only draft; None without them."""
    return str(draft.draft_weights) if draft.has_weights else None


def retrieval_weights_name(draft: DraftConfig) -> str | None:
    """Which weights triforce drafts with over its retrieval cache; None without it."""
    return str(draft.retrieval.retrieval_weights) if draft.over_retrieval else None


def layer_ranges(layers: Sequence[int]) -> str:
    """Layer numbers, runs of them as ranges: `0-3, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def layer_words(layers: Sequence[int]) -> str:
    """Layer numbers as ranges, or in few words where they are spread evenly."""
    gaps = sorted({later - layer for layer, later in pairwise(layers)})
    if len(layers) < 5 or gaps[0] < 2 or gaps[-1] - gaps[0] > 1:
        return layer_ranges(layers)
    steps = " or ".join(f"{gap}{_ORDINALS.get(gap, 'th')}" for gap in gaps)
    return f"every {steps} from {layers[0]} to {layers[-1]}"
