"""What `plan` says of a mixture of experts."""

from dataclasses import dataclass
from math import prod

from offload_rt.cli.columns import hanging
from offload_rt.costs.sizes import experts_of
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.planning.fit import pooled_experts
from offload_rt.planning.planner import Plan
from offload_rt.session.summary import layer_words
from offload_rt.units import format_rate, format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOutlook:
    """What is expected of experts that come one by one.

    Attributes:
        slots: device buffers for them, of `slot_bytes` each.
        experts: of all layers; `per_token` of a layer compute a token.
        share: of all experts that the slots hold.
        hit_rate: of a token's experts, expected to be there.
        measured: the hit rate is of this model's own passes; else of routers with little locality.
        stated: it is given by hand.
        bytes_per_token: expected to be read for a token without drafting.
        bytes_per_s: expected of these reads, alone; None where a token needs none.
        on_host_per_token: of a token's experts, expected to be computed by the processor where they
            lie; they are read behind all others.
        total_parameters: of the model.
        active_parameters: that a token meets, the embedding's row among them not counted.
        active_bytes: of these in the files.
        whole_layers: that have their experts in them.
    """

    slots: int
    slot_bytes: int
    experts: int
    per_token: int
    share: float
    hit_rate: float
    measured: bool
    stated: bool
    bytes_per_token: int
    bytes_per_s: float | None
    on_host_per_token: float
    total_parameters: int
    active_parameters: int
    active_bytes: int
    whole_layers: tuple[int, ...] = ()


def expert_outlook(checkpoint: Checkpoint, plan: Plan, device: DeviceKind) -> ExpertOutlook | None:
    """What is expected; None where layers are whole."""
    placement = plan.placement
    facts, pooled = (
        placement.demand.experts,
        pooled_experts(placement, device, plan.runtime.look_ahead, plan.misses),
    )
    if facts is None or pooled is None:
        return None
    layers = placement.pooled_layers
    every = (placement.demand.of_units or placement.demand).experts or facts
    asked = every.per_token * every.layers
    expected = plan.prediction
    misses = sum(pooled.misses(index, 1) for index in layers)
    splits = [pooled.split(index, 1, pooled.per_token) for index in layers]
    stored = dict.fromkeys(checkpoint.stored.values())
    plain = [e for name, e in checkpoint.tensors.items() if name not in checkpoint.stored]
    total = sum(prod(e.shape) for e in plain) + sum(each.numbers for each in stored)
    quantised = sum(each.numbers for each in stored if each.of_expert)
    inside = quantised or round(every.file_bytes * total / max(1, checkpoint.total_bytes))
    idle_share = 1.0 - asked / every.count
    idle_bytes = round(every.file_bytes * idle_share)
    return ExpertOutlook(
        slots=placement.expert_slots,
        slot_bytes=facts.slot_bytes,
        experts=every.count,
        per_token=facts.per_token,
        share=placement.expert_slots / every.count,
        hit_rate=1.0 - misses / asked,
        measured=0 in pooled.use.seen,
        stated=pooled.use.hit_rate is not None,
        bytes_per_token=round(misses * pooled.home_bytes),
        bytes_per_s=expected.home_bytes / expected.transfer_s
        if expected is not None and expected.transfer_s
        else None,
        on_host_per_token=sum(split.on_host for split in splits if split),
        total_parameters=total,
        active_parameters=total - round(inside * idle_share),
        active_bytes=checkpoint.total_bytes - idle_bytes,
        whole_layers=placement.whole_layers,
    )


def expert_lines(outlook: ExpertOutlook, away: str) -> list[str]:
    """The same in words."""
    rate = f" at {format_rate(outlook.bytes_per_s)}" if outlook.bytes_per_s else ""
    there = outlook.on_host_per_token
    host = f", {there:.1f} experts computed on the CPU meanwhile" if there else ""
    whole = f", of layers {layer_words(outlook.whole_layers)} all stay"
    whole = whole if outlook.whole_layers else ""
    total, active = outlook.total_parameters / 1e9, outlook.active_parameters / 1e9
    return [
        f"in {away}, read expert by expert",
        hanging(
            f"  {outlook.experts} experts, {outlook.per_token} of a layer for each token "
            f"({active:.2f} of {total:.2f} billion parameters active){whole}",
            4,
        ),
        hanging(
            f"  {hits_in_words(outlook)}, {format_size(outlook.bytes_per_token)} read per "
            f"token{rate}{host}",
            4,
        ),
    ]


def hits_in_words(outlook: ExpertOutlook) -> str:
    """How many of a token's experts are expected to be there, and how that is known."""
    known = "as seen" if outlook.measured else "as routers with little locality have it"
    known = "as stated" if outlook.stated else known
    return f"{outlook.hit_rate:.0%} of a token's experts expected in the slots ({known})"


def ways_record(plan: Plan) -> list[dict[str, object]]:
    """Ways for experts to come that were looked at, as `--json` has them."""
    return [
        {
            "one_by_one": way.one_by_one,
            "expert_slots": way.placement.expert_slots,
            "whole_layers": len(way.placement.whole_layers),
            "resident_layers": way.prediction.resident_layers,
            "bytes_per_pass": way.prediction.bytes_per_pass,
            "s_per_token": way.prediction.s_per_token,
            "prompt_s": way.prompt_s,
        }
        for way in plan.ways
    ]


def why_whole(checkpoint: Checkpoint, plan: Plan, device: DeviceKind) -> str:
    """Why the layers of a mixture of experts are streamed whole.

    Raises:
        CheckpointError: its experts are not alike.
    """
    config = plan.runtime
    if plan.ways:
        return "one by one experts are predicted to take longer"
    if config.expert_slots == 0:
        return "--expert-slots is 0"
    if len(config.device_names) > 1:
        return "on several devices experts do not come one by one in this version"
    found = experts_of(checkpoint, config.dtype, device)
    if isinstance(found, str):
        return found
    if config.slots is not None or config.resident_layers is not None:
        return "--slots and --resident-layers are of whole layers"
    return "what is resident where experts come one by one does not fit"
