"""What a planner needs to know: the machine's profile, and the acceptance of earlier runs."""

import dataclasses
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from offload_rt.config import (
    DraftConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.machine import Levels, Speeds, speeds_of
from offload_rt.device.cuda.nvml import find_driver
from offload_rt.device.kinds import DeviceKind, sharing
from offload_rt.device.system import compute_threads, processor
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.exactness import headers_problem
from offload_rt.model.formats.left_plain import left_plain
from offload_rt.planning.history import experience_key, model_key, read_asked, read_seen
from offload_rt.planning.levels import LevelKey, read_levels
from offload_rt.planning.plan_file import PlanFile
from offload_rt.planning.planner import Means
from offload_rt.planning.yields import Yield, expected_yield
from offload_rt.profiling.decoding import standing_in
from offload_rt.profiling.profile import HardwareProfile
from offload_rt.profiling.store import (
    find_profile,
    list_profiles,
    load_profile,
    machine_name,
    user_folder,
)
from offload_rt.session.settings import Settings
from offload_rt.speculative.draft_model.pair import open_draft_checkpoint
from offload_rt.speculative.kind import SIZES, Points
from offload_rt.speculative.medusa.calibration import best_trees, read_calibration
from offload_rt.speculative.medusa.checkpoint import open_draft_heads

if TYPE_CHECKING:
    from offload_rt.nodes.roster import Roster


def experience_path() -> Path:
    """The file in which what drafting gave is kept, beside the user's profiles."""
    return user_folder().parent / "drafting.json"


def asked_path() -> Path:
    """The file in which it is kept which experts tokens asked for, beside it."""
    return experience_path().with_name("experts.json")


def levels_path() -> Path:
    """The file in which the pace of recent runs is kept, beside it."""
    return experience_path().with_name("levels.json")


def profile_for(profile: str | None, device: DeviceKind) -> tuple[HardwareProfile, bool]:
    """This machine's profile, or the one that is asked for; and whether it is either of them.

    Without a profile of its own the machine is planned for with a shipped one: a GPU's of the same
    name, else one like it, with the kernels for stored weights that are here.

    Raises:
        ProfileError: there is no such profile, or it is damaged.
    """
    name = machine_name() if profile is None else profile
    own = profile is not None or name in list_profiles()
    found = load_profile(find_profile(name if own else _stand_in(device)))
    return (found if own else standing_in(found)), own


def profile_source(name: str, own: bool) -> str:
    """How output calls the profile that a prediction rests on."""
    return name if own else f"{name}; measure this machine with `offload-run profile`"


def speeds_for(profile: str | None, device: DeviceKind, name: str = "auto") -> Speeds:
    """Speeds of the profile that `profile_for` finds, for what computes there.

    Args:
        profile: asked for, or None.
        device: the kind that computes.
        name: of the device, or of several, as in --device.

    Raises:
        ProfileError: there is no such profile, or it is damaged.
    """
    found, own = profile_for(profile, device)
    there = speeds_of(found, device.processor, sharing(name))
    packs = there.packs and bool(processor()[1])
    return with_left_plain(dataclasses.replace(there, packs=packs, own=own))


def with_left_plain(speeds: Speeds) -> Speeds:
    """The speeds; of this machine's processor, with the shapes that runs found to stay plain."""
    here = speeds.packs and speeds.profile.machine.cpu == processor()[0]
    return dataclasses.replace(speeds, left_plain=left_plain()) if here else speeds


def speeds_of_run(settings: Settings, device: DeviceKind) -> Speeds:
    """Speeds for a run, those of its other machines with them.

    Raises:
        ProfileError: there is no such profile, or it is damaged.
    """
    if settings.nodes is None:
        return speeds_for(settings.profile, device, settings.runtime.device)
    speeds = speeds_for(settings.profile, device)
    return with_nodes(speeds, settings.nodes.roster, settings.profile, device)


def with_nodes(speeds: Speeds, roster: "Roster", profile: str | None, device: DeviceKind) -> Speeds:
    """The speeds of a machine, with those of the others that have layers in turn with it.

    Args:
        speeds: of the first.
        roster: all of them.
        profile: of those that name none.
        device: the kind that computes, on each.

    Raises:
        ProfileError: there is no such profile, or it is damaged.
    """
    first, *others = roster.nodes
    if first.profile is not None:
        speeds = speeds_for(first.profile, device)
    further = [speeds_for(node.profile or profile, device) for node in others]
    network = roster.bytes_per_s, roster.latency_s
    return dataclasses.replace(speeds, devices=(0,), further=tuple(further), network=network)


def means_for(
    checkpoint: Checkpoint, sampling: SamplingConfig, speeds: Speeds, draft: DraftConfig
) -> Means:
    """Everything the planner asks: speeds, and what drafting gives with these models."""
    drafter = open_draft_checkpoint(checkpoint, draft, runs=False)
    known: dict[str, Yield] = {}
    calibrated = _calibrated(checkpoint, draft)

    def yields(config: DraftConfig) -> Yield:
        # As what a run saw is kept: a model that `auto` looks at drafts for that candidate alone.
        own = drafter if config.model or not draft.automatic else None
        key = experience_key(checkpoint, config, own, sampling)
        if key not in known:
            known[key] = expected_yield(config.kind, read_seen(experience_path(), key), calibrated)
        return known[key]

    @cache
    def level(streams: bool, running: int) -> Levels:
        threads = compute_threads()
        key = LevelKey.of(speeds, threads, checkpoint, streams=streams, running=running)
        return read_levels(levels_path(), key, time.time())

    asked = read_asked(asked_path(), model_key(checkpoint))
    return Means(
        speeds=speeds,
        yields=yields,
        level=level,
        asked=asked,
        repeats=sampling.repeats,
        sampled=not sampling.greedy,
    )


def check_plan(plan: PlanFile | None, checkpoint: Checkpoint) -> None:
    """Refuse a plan of another model.

    Raises:
        ConfigError: the models have different numbers of layers.
    """
    if plan is not None and plan.layers != checkpoint.config.num_layers:
        raise ConfigError(
            f"the plan is for {plan.model} of {plan.layers} layers, {checkpoint.name} has "
            f"{checkpoint.config.num_layers}: make one for it with `offload-run plan --output`"
        )


def reproducible(
    draft: DraftConfig, sampling: SamplingConfig, runtime: RuntimeConfig
) -> DraftConfig:
    """Fix what measured times would decide, where that can change the answer of a seed.

    It cannot where passes are row-invariant and a draft only proposes: one random number for each
    place decides, whatever is drafted. Typical acceptance, and drafters that draw, go by the draft;
    where who drafts is left open, the planner leaves these out (`Means.repeats`).
    """
    if not sampling.repeats:
        return draft
    from offload_rt.device.opening import chosen_kind

    kind = chosen_kind(runtime.each_device()[0])
    if not draft.answers_rest_on_it and not headers_problem(runtime, kind):
        return draft
    if draft.automatic:
        return draft.chosen("none")
    return dataclasses.replace(draft, draft_tokens=draft.nodes or None)


def _stand_in(device: DeviceKind) -> str:
    driver = find_driver() if device.own_memory else None
    names = [gpu.name for gpu in driver.gpus[:1]] if driver is not None else []
    for name, path in list_profiles().items():
        gpus = load_profile(path).machine.gpus if names else ()
        if gpus and gpus[0].name == names[0]:
            return name
    return device.stand_in if processor()[1] else device.stand_in_without_bf16


def _calibrated(checkpoint: Checkpoint, draft: DraftConfig) -> Points | None:
    """What a calibration says of Medusa heads, if they have one."""
    heads = open_draft_heads(checkpoint, draft)
    calibration = None if heads is None else read_calibration(heads.folder)
    if calibration is None:
        return None
    trees = best_trees(calibration.accuracy, SIZES[-1])
    return tuple((size, trees.tokens_per_pass(size) - 1.0) for size in SIZES)
