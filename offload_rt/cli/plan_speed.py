"""How fast a plan should be and why it was chosen, as lines of text."""

from collections.abc import Sequence

from offload_rt.cli.columns import hanging
from offload_rt.costs.machine import Speeds
from offload_rt.costs.pass_cost import Limit
from offload_rt.costs.step import Prediction
from offload_rt.planning.planner import Considered, Plan, Way
from offload_rt.profiling.decoding import times_unlike
from offload_rt.profiling.identity import old_profile
from offload_rt.profiling.profile import Obtained
from offload_rt.session.means import profile_source
from offload_rt.session.summary import drafter_name, drafts_name
from offload_rt.units import format_size, format_speed

_SHOWN = 6  # ways of drafting


def speed_lines(plan: Plan, speeds: Speeds) -> list[str]:
    """A plan's prediction with its parts, then the other ways that were looked at."""
    if plan.prediction is None:
        return []
    source = f"profile {profile_source(speeds.profile.name, speeds.own)}"
    if terms := corrections(plan):
        source += f"; corrected by recent runs: {terms}"
    chosen = plan.prediction
    lines = [
        hanging(f"predicted ({source})", 2),
        _line("speed", format_speed(chosen.s_per_token), _yield(chosen, chosen.obtained)),
        _line("a pass", f"{chosen.pass_s:.3f} s", _parts(chosen)),
    ]
    if chosen.draft_s:
        lines.append(_line("drafting", f"{chosen.draft_s:.3f} s", f"{drafts_name(plan)} a pass"))
    elif plan.watches:
        lines.append(_line("drafting", "", drafts_name(plan)))
    lines.append(_line("bound by", chosen.limit, _advice(chosen)))
    if chosen.old_profile:
        profile = speeds.profile
        said = old_profile(profile.name, layers=times_unlike(profile, exact=True))
        lines.append(hanging(f"  {said}", 4))
    if plan.ways:
        lines += ["how experts may come", *map(_way, plan.ways)]
    others = _others(plan)
    return [*lines, *(["other ways", *others] if others else [])]


def corrections(plan: Plan) -> str:
    """How many times as long as the profile says copies and computing take; empty: as long."""
    assert plan.placed is not None  # there is a prediction
    levels = plan.placed.speeds.levels
    terms = {"computing": levels.computing}
    if plan.placement.streams:
        terms = {"reading": levels.reading} | terms
    return ", ".join(f"{term} x{level:.2f}" for term, level in terms.items() if level != 1.0)


def _way(way: Way) -> str:
    """How fast a way for experts to come should be, and what it reads."""
    made, placement = way.prediction, way.placement
    name = "one by one" if way.one_by_one else "in whole layers"
    held = f"{placement.expert_slots} slots"
    if whole := len(placement.whole_layers):
        held += f", {whole} of {len(placement.layers)} layers whole"
    if not way.one_by_one:
        held = f"{made.resident_layers} of {len(placement.layers)} layers resident"
    detail = f"{made.s_per_token:.3f} s/token, {format_size(made.home_bytes)} a pass, {held}"
    if way.answer_tokens:
        detail += f"; {way.prompt_s:.2f} s for the prompt"
    return _line(name, format_speed(made.s_per_token), detail)


def _yield(prediction: Prediction, obtained: Obtained | None = None) -> str:
    """Seconds and tokens; how speeds are known, where that is to be said."""
    known = f", {obtained} speeds" if obtained else ""
    return (
        f"{prediction.s_per_token:.3f} s/token, {prediction.tokens_per_pass:.2f} tokens per pass"
        f"{known}"
    )


def _parts(prediction: Prediction) -> str:
    parts = f"computing {prediction.compute_s:.3f} s, waiting {prediction.stall_s:.3f} s"
    if prediction.home_bytes:
        parts += f" for {format_size(prediction.home_bytes)}"
    return parts


def _advice(prediction: Prediction) -> str:
    if prediction.limit is Limit.TRANSFER and not prediction.streamed_layers:
        return "more --device-memory holds more of what is read in each pass"
    if prediction.limit is Limit.TRANSFER:
        return "more --device-memory keeps more layers there, more draft tokens share a pass"
    if prediction.limit is Limit.DRAFTING:
        return "a smaller draft model or fewer draft tokens"
    if prediction.limit is Limit.LATENCY:
        return "copying and computing take turns: more --slots would let them overlap"
    return "arithmetic and reading weights on the device"


def _others(plan: Plan) -> Sequence[str]:
    """The best of each drafter, the sizes next to the chosen one, and what does not fit."""
    chosen = plan.first.config
    rest = [c for c in plan.considered if c.draft != chosen and (c.draft.drafts or chosen.drafts)]
    fitting = [c for c in rest if c.prediction is not None]
    fitting.sort(key=lambda c: c.prediction.s_per_token if c.prediction else 0.0)
    none = [c for c in fitting if not c.draft.drafts]
    shown = [*none, *(c for c in fitting if c not in none)][:_SHOWN]
    lines = [_considered(c) for c in shown]
    refused = [c for c in rest if c.prediction is None]
    return [*lines, *(hanging(f"  {_label(c)}: {c.refusal}", 4) for c in refused[:1])]


def _considered(way: Considered) -> str:
    assert way.prediction is not None
    return _line(_label(way), format_speed(way.prediction.s_per_token), _yield(way.prediction))


def _label(way: Considered) -> str:
    name = drafter_name(way.draft)
    return f"{name} {way.draft.nodes}" if way.draft.nodes else "no drafting"


def _line(what: str, number: str, detail: str) -> str:
    head = f"  {what:<18}{number:>15}  "
    return hanging(f"{head}{detail}".rstrip(), len(head))
