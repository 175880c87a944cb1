"""`offload-run simulate`: seconds and bytes of a run on a machine not at hand; needs no torch."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from offload_rt.cli import options
from offload_rt.cli.chat import AUTO_CONTEXT_TOKENS
from offload_rt.cli.columns import hanging
from offload_rt.cli.console import quiet_libraries
from offload_rt.cli.headline import (
    More,
    headline,
    more_memory,
    prediction_record,
    quantised_lines,
)
from offload_rt.cli.options import Output, draft_of, runtime_of
from offload_rt.cli.plan_experts import ExpertOutlook, expert_outlook
from offload_rt.cli.simulate_table import (
    comparisons_table,
    model_table,
    prediction_table,
    scenario_help,
)
from offload_rt.config import DraftConfig, RuntimeConfig, Wire
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.experts import ExpertUse
from offload_rt.costs.machine import FreeMemory, Speeds, speeds_there
from offload_rt.costs.sizes import StoredSizes, stored_sizes
from offload_rt.costs.step import Prediction
from offload_rt.device.kinds import check_links, likely_kind
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint, resolve_model
from offload_rt.model.outline import open_or_outline
from offload_rt.model.packed_files import NAMED
from offload_rt.model.wire import as_if_packed, wired
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.given_rates import Acceptance, expect, parse_ranks
from offload_rt.planning.history import model_key, read_asked
from offload_rt.planning.placement import Placement
from offload_rt.planning.planner import Means, plan_wires
from offload_rt.planning.scenarios.published import Comparison, compare_published
from offload_rt.planning.scenarios.scenario import load_scenario
from offload_rt.planning.scenarios.simulate import simulate
from offload_rt.printable import printable
from offload_rt.profiling.adjust import NAMES, adjust_profile
from offload_rt.profiling.store import find_profile, load_profile
from offload_rt.session.early import check_context
from offload_rt.session.means import asked_path, profile_for, profile_source, with_left_plain
from offload_rt.session.summary import bound_by
from offload_rt.speculative.draft_model.kind import settled
from offload_rt.speculative.draft_model.pair import open_draft_checkpoint
from offload_rt.speculative.medusa.checkpoint import heads_bytes, open_draft_heads

_MODES = {"scenario": "--scenario", "validate": "--validate", "scenario_help": "--scenario-help"}


@click.command("simulate")
@click.argument("model", required=False)
@click.option(
    "--profile",
    "profile_name",
    type=options.PROFILE,
    default=None,
    show_default="this machine's, else a shipped one like it",
    help="The machine: a profile by name, or its file; used instead of a scenario's.",
)
@click.option(
    "--profile-set",
    multiple=True,
    metavar="KEY=VALUE",
    show_default="none",
    help=f"Change a number of the profile: {', '.join(NAMES)}, or a place in the file as "
    "links[0].bytes_per_s; may be given several times.",
)
@click.option(
    "--scenario",
    type=click.Path(path_type=Path),
    default=None,
    help="Take everything from a scenario file instead of MODEL and options.",
)
@click.option("--scenario-help", is_flag=True, help="Explain the keys of a scenario file.")
@click.option(
    "--validate", is_flag=True, help="Predict the published runs that come along; show both times."
)
@click.option(
    "--acceptance",
    default=None,
    metavar="RATES",
    help="Share of drafted tokens that are accepted if those before them are: a rate for each "
    "depth (0.8,0.7; the last goes on), for trees the rates of the ranks (0.6/0.2,0.5/0.1).",
)
@click.option(
    "--inner-acceptance",
    default=None,
    metavar="RATES",
    help="The same for what is drafted for triforce's own passes; without it nothing is. "
    "With triforce:MODEL it has to be given.",
)
@click.option(
    "--tokens-per-pass",
    type=click.FloatRange(min=1, max=2**20),
    default=None,
    help="Tokens a pass emits, if that is what is known.",
)
@click.option(
    "--expert-hits",
    type=click.FloatRange(min=0, max=1),
    default=None,
    show_default="what runs of this model here saw, else a prior",
    help="Share of a token's experts that are in their slots, where experts come one by one.",
)
@options.placement_options
@options.wire_option
@click.option(
    "--bits",
    type=click.Choice([*NAMED]),
    default=None,
    show_default="a packed folder's own, else 12",
    help="With --wire lossless: as if MODEL were packed with these --bits.",
)
@options.stated_draft_options
@options.together_option
@options.json_option
@click.pass_context
def simulate_verb(context: click.Context, model: str | None, **values: Any) -> int:  # noqa: ANN401
    """Predict what a run would take, from a profile and sizes alone.

    MODEL needs no weights: config.json suffices. Layers are placed as a run would
    place them on the profile's machine if nothing else used it; then the real rings run in
    virtual time. Nothing is measured here: the answer is as good as the profile. `plan` also counts
    how much slower or faster than it recent runs on this machine were; simulate does not.
    """
    mode = _mode(context, model)
    if mode == "scenario_help":
        click.echo(scenario_help())
    elif mode == "validate":
        _validate(values["json"])
    elif mode == "scenario":
        _scenario(values)
    else:
        assert model is not None  # _mode saw to it
        _model(model, values)
    return 0


def _mode(context: click.Context, model: str | None) -> str:
    """Which of the four things to do.

    Raises:
        ConfigError: none or several of them are asked for, or an option that has no effect.
    """
    given = [
        name
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    modes = [name for name in _MODES if name in given]
    if len(modes) + (model is not None) != 1:
        wanted = ", ".join(["MODEL", *_MODES.values()])
        raise ConfigError(f"simulate needs one of {wanted}")
    if not modes:
        return "model"
    allowed = {modes[0], "json"}
    if modes[0] == "scenario":
        allowed |= {"profile_name", "profile_set"}
    for name in given:
        if name not in allowed:
            raise ConfigError(
                f"{_flag_of(context, name)} has no effect with {_MODES[modes[0]]}: leave it out"
            )
    return modes[0]


def _flag_of(context: click.Context, name: str) -> str:
    """The option as it is typed."""
    found = (p.opts[-1] for p in context.command.params if p.name == name)
    return next(found, name)


def _validate(as_json: bool) -> None:
    rows = compare_published()
    click.echo(json.dumps([_row(row) for row in rows]) if as_json else comparisons_table(rows))


def _row(row: Comparison) -> dict[str, Any]:
    return {
        "scenario": row.scenario.name,
        "profile": row.scenario.profile,
        "per": row.per,
        "published_s": row.found_s,
        "predicted_s": row.predicted_s,
        "error": row.error,
        "hit": row.hit,
        "assumed_inputs": list(row.assumed),
        "source": row.scenario.found.source if row.scenario.found else "",
        "prediction": prediction_record(row.prediction),
    }


def _scenario(values: dict[str, Any]) -> None:
    scenario = load_scenario(values["scenario"])
    named = values["profile_name"]
    name = scenario.profile if named is None else named
    profile = load_profile(find_profile(name))
    scenario = dataclasses.replace(scenario, set=(*scenario.set, *values["profile_set"]))
    made = simulate(scenario, profile)  # the flags come last, so they count
    if values["json"]:
        known = {"scenario": scenario.name, "profile": profile.name}
        click.echo(json.dumps(known | prediction_record(made)))
    else:
        head = f"{scenario.name}, {scenario.model.layers} layers, on {profile.name}"
        click.echo("\n".join([printable(head), *prediction_table(made)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked about a model on a machine, but for where it runs and what it may use.

    Attributes:
        from_files: whether its weights are there.
        own: whether the profile is this machine's, or was asked for.
        acceptance: how often drafts are right.
        use: what is known of the experts that tokens ask for.
        sequences: that run at once, each with as many tokens.
    """

    checkpoint: Checkpoint
    from_files: bool
    own: bool
    speeds: Speeds
    draft: DraftConfig
    acceptance: Acceptance
    context_tokens: int
    use: ExpertUse = ExpertUse()
    sequences: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A simulated run, what it was made from, and what more memory would give."""

    question: Question
    checkpoint: Checkpoint
    config: RuntimeConfig
    draft: DraftConfig
    placement: Placement
    pinned_bytes: int
    prediction: Prediction
    experts: ExpertOutlook | None
    more: More | None = None

    @property
    def stored(self) -> StoredSizes | None:
        """The sizes of weights that are decoded or dequantised."""
        return stored_sizes(self.checkpoint, self.config.dtype, self.question.speeds.device)


def _model(model: str, values: dict[str, Any]) -> None:
    quiet_libraries(Output())
    config, draft = runtime_of(values), draft_of(values)
    check_links(config)
    found, own = profile_for(values["profile_name"], likely_kind(config.device))
    profile = adjust_profile(found, values["profile_set"])
    acceptance = Acceptance(
        ranks=parse_ranks(values["acceptance"], "--acceptance") if values["acceptance"] else (),
        inner=parse_ranks(values["inner_acceptance"], "--inner-acceptance")
        if values["inner_acceptance"]
        else (),
        tokens_per_pass=values["tokens_per_pass"],
    )
    speeds = with_left_plain(speeds_there(profile, config.device))
    checkpoint, from_files = open_or_outline(resolve_model(model))
    if config.context_tokens is not None:
        check_context(checkpoint, config.context_tokens)
    bits = values["bits"]
    if config.wire is Wire.LOSSLESS:
        checkpoint = as_if_packed(checkpoint, bits and NAMED[bits])
    elif bits is not None:
        raise ConfigError(f"--bits has no effect with --wire {config.wire}: leave it out")
    wired(checkpoint, config.wire)  # refuses what cannot be
    question = Question(
        checkpoint=checkpoint,
        from_files=from_files,
        own=own,
        speeds=speeds,
        draft=draft,
        acceptance=acceptance,
        use=_use(checkpoint, values["expert_hits"]),
        context_tokens=config.context_tokens
        or min(checkpoint.config.max_positions, AUTO_CONTEXT_TOKENS),
        sequences=values["sequences"],
    )
    drafting = _drafting(question, config)
    outlook = simulated(question, config, speeds.free, drafting)

    def with_limits(roomy: RuntimeConfig, there: FreeMemory) -> float:
        return simulated(question, roomy, there, drafting).prediction.s_per_token

    made = outlook.placement, outlook.prediction.s_per_token
    more = more_memory(config, speeds.device, speeds.free, made, with_limits)
    outlook = dataclasses.replace(outlook, more=more)
    click.echo(json.dumps(_as_json(outlook)) if values["json"] else _as_table(outlook))


def _use(checkpoint: Checkpoint, hit_rate: float | None) -> ExpertUse:
    """Which experts tokens ask for: as it is stated, else as earlier runs of the model saw it."""
    if hit_rate is not None:
        return ExpertUse(hit_rate=hit_rate)
    return read_asked(asked_path(), model_key(checkpoint))


def simulated(
    asked: Question, config: RuntimeConfig, free: FreeMemory, drafting: Drafting
) -> Simulated:
    """What a run would take.

    Args:
        asked: of what model, on what machine.
        config: where it runs, and what it may use.
        free: memory of that machine.
        drafting: who drafts how much, with the sizes of what drafts.

    Raises:
        ConfigError: an option has no effect, or too little is said of the acceptance.
        PlanError: it does not fit.
        ProfileError: the profile lacks a number.
    """
    speeds, context = asked.speeds, asked.context_tokens
    expect(asked.draft, asked.acceptance)  # refuses what says too little
    checkpoint, plan = plan_wires(
        asked.checkpoint,
        config,
        speeds.device,
        load=RunLoad.alike(asked.sequences, context, drafting),
        free=free,
        means=Means(
            speeds=speeds,
            asked=asked.use,
            stated=lambda sized: expect(sized, asked.acceptance),
        ),
    )
    assert plan.prediction is not None  # as speeds are known
    if asked.use.hit_rate is not None and not (plan.placement.expert_slots or plan.ways):
        raise ConfigError(
            "--expert-hits has no effect, as no experts come one by one here: leave it out"
        )
    return Simulated(
        question=asked,
        checkpoint=checkpoint,
        config=plan.runtime,
        draft=plan.drafting.config,
        placement=plan.placement,
        pinned_bytes=speeds.pinned_bytes(plan.runtime, plan.placement.host_bytes),
        prediction=plan.prediction,
        experts=expert_outlook(checkpoint, plan, speeds.device),
    )


def _drafting(asked: Question, config: RuntimeConfig) -> Drafting:
    """The drafter's sizes; of a draft model config.json suffices too."""
    checkpoint, speeds = asked.checkpoint, asked.speeds
    draft = dataclasses.replace(asked.draft, draft_tokens=asked.draft.nodes or None)
    heads = open_draft_heads(checkpoint, draft)
    nbytes = heads_bytes(heads, checkpoint, config.dtype, speeds.device, asked.sequences)
    drafter = open_draft_checkpoint(checkpoint, draft, runs=False)
    return settled(Drafting(draft, drafter, nbytes), speeds.device)


def _as_json(outlook: Simulated) -> dict[str, Any]:
    placement, asked = outlook.placement, outlook.question
    known = {
        "model": str(asked.checkpoint.folder),
        "weights_read": asked.from_files,
        "profile": asked.speeds.profile.name,
        "own_profile": asked.own,
        "device": str(asked.speeds.processor),
        "wire": str(outlook.config.wire),
        "quantised": dataclasses.asdict(outlook.stored) if outlook.stored else None,
        "context_tokens": asked.context_tokens,
        "sequences": asked.sequences,
        "drafter": outlook.draft.draft,
        "draft_tokens": outlook.draft.nodes,
        "home": str(placement.home),
        "host_bytes": placement.host_bytes,
        "host_base_bytes": placement.demand.host_base_bytes,
        "file_base_bytes": placement.demand.file_base_bytes,
        "host_pinned_bytes": outlook.pinned_bytes,
        "kv": str(placement.demand.kv.place) if placement.demand.kv else "device",
        "slots": placement.slots,
        "workspace_bytes": placement.workspace_bytes,
        "context_bytes": placement.context_bytes,
        "slack_bytes": placement.slack_bytes,
        "device_bytes": placement.device_bytes,
        "device_limit_bytes": placement.device_limit_bytes,
        "experts": dataclasses.asdict(outlook.experts) if outlook.experts else None,
        "more_memory": dataclasses.asdict(outlook.more) if outlook.more else None,
    }
    return known | prediction_record(outlook.prediction)


def _as_table(outlook: Simulated) -> str:
    asked, made = outlook.question, outlook.prediction
    speeds = asked.speeds
    bound = bound_by(made.limit, outlook.placement)
    name = outlook.checkpoint.name
    first = hanging(headline(name, made.s_per_token, bound, outlook.more), 2)
    table = model_table(
        outlook.checkpoint,
        outlook.placement,
        made,
        experts=outlook.experts,
        pinned_bytes=outlook.pinned_bytes,
        source="headers" if asked.from_files else "config.json alone",
        machine=f"{profile_source(speeds.profile.name, asked.own)} ({speeds.processor})",
    )
    return "\n".join([first, *quantised_lines(outlook.stored), table])
