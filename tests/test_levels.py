"""What runs say of the hour: kept, bounded, forgotten, and every prediction follows it."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from engines import engine_for, generate
from expert_models import make_mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import compressed_tensors, write_twins
from test_planner import FREE, PROFILE, speeds

import offload_rt
from offload_rt.config import DraftConfig, HomeKind, RuntimeConfig
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory, Levels, speeds_of
from offload_rt.device.kinds import CPU, Processor
from offload_rt.device.system import compute_threads
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.outline import outline_checkpoint
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.levels import (
    LASTS_S,
    LEAST,
    MOST,
    LevelKey,
    Pace,
    SeenLevels,
    Took,
    add_levels,
    levels_of,
    read_levels,
)
from offload_rt.planning.planner import Means, plan_run
from offload_rt.planning.yields import expected_yield
from offload_rt.session.means import levels_path

KEY = LevelKey(machine="box of 2026, cpu, 2 threads", streams=True, model="big of 9 bytes")
HOUR = 3600.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "levels.json"


def add_level(path, key, level, now_s):
    """Keep one level of both terms."""
    add_levels(path, key, SeenLevels(level, level), now_s)


def read_level(path, key, now_s):
    """The level of both terms."""
    found = read_levels(path, key, now_s)
    assert found.reading == found.computing
    return found.reading


def test_runs_move_the_level_towards_what_they_found(path):
    assert read_level(path, KEY, 0.0) == 1.0
    add_level(path, KEY, 2.0, 0.0)
    assert read_level(path, KEY, 1.0) == 2.0
    add_level(path, KEY, 1.0, HOUR)
    assert read_level(path, KEY, HOUR) == 1.5
    for _ in range(4):
        add_level(path, KEY, 1.0, HOUR)
    assert read_level(path, KEY, HOUR) == 1.0  # so near to it that it is none


def test_an_hour_is_forgotten(path):
    add_level(path, KEY, 3.0, 0.0)
    assert read_level(path, KEY, LASTS_S) == 3.0
    assert read_level(path, KEY, LASTS_S + 1.0) == 1.0 == read_level(path, KEY, -1.0)
    add_level(path, KEY, 2.0, LASTS_S + 1.0)  # and weighs nothing
    assert read_level(path, KEY, LASTS_S + 1.0) == 2.0


def test_a_model_without_runs_takes_what_others_found_of_the_same_kind(path):
    for ratio, model in ((1.2, "a"), (1.5, "b"), (3.9, "c")):
        add_level(path, replace(KEY, model=model), ratio, 0.0)
    assert read_level(path, KEY, 0.0) == 1.5
    add_level(path, KEY, 2.5, 0.0)
    assert read_level(path, KEY, 0.0) == 2.5
    assert read_level(path, replace(KEY, streams=False), 0.0) == 1.0
    assert read_level(path, replace(KEY, machine="box of 2027"), 0.0) == 1.0


def test_what_computes_with_other_weights_says_something_of_the_disk_alone(
    path, tmp_path, make_tiny
):
    """Once a W4A16 folder was planned 1.9 times too slow after `--wire int8` had run."""
    pair = write_twins(make_tiny("llama"), tmp_path, *compressed_tensors(4, 32))
    keys = [
        LevelKey.of(speeds(1e8), 2, open_checkpoint(folder), streams=True, running=1)
        for folder in (pair.plain, pair.folder, make_mixture(make_tiny))
    ]
    assert [key.weights for key in keys] == ["plain", "packed 4 bits", "plain of experts"]
    for key in keys:
        add_levels(path, key, SeenLevels(2.0, 3.0), 0.0)
        other = replace(key, model="another")
        assert read_levels(path, other, 0.0) == Levels(reading=2.0, computing=3.0)
        unlike = replace(key, model="another", weights="bnb4 4 bits")
        assert read_levels(path, unlike, 0.0) == Levels(reading=2.0, computing=1.0)


@given(st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(0.0, 1e6)), min_size=1))
@settings(max_examples=20, deadline=None)
def test_whatever_runs_say_it_is_bounded(tmp_path_factory, runs):
    path = tmp_path_factory.mktemp("levels") / "levels.json"
    for ratio, at_s in runs:
        add_level(path, KEY, ratio, at_s)
        assert LEAST <= read_level(path, KEY, at_s) <= MOST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "entries": {}}',
        '{"version": 1, "entries": {"x": [1.0]}}',
        '{"version": 1, "entries": {"x": [99.0, 0.0]}}',
        '{"version": 1, "entries": {"x": [NaN, 0.0]}}',
        '{"version": 1, "entries": {"x": ["a", 0.0]}}',
        '{"version": 1, "entries": {"x": 7}}',
        '{"version": 1, "entries": {"x": {"reading": [99.0, 0.0]}}}',
        '{"version": 1, "entries": {"x": {"computing": [2.0]}}}',
        '{"version": 1, "entries": {"x": {"computing": [2.0, NaN]}}}',
        '{"version": 1, "entries": {"x": {"reading": 2.0}}}',
        "[" * 10_000,
    ],
)
def test_a_damaged_file_is_none(path, text):
    path.parent.mkdir()
    path.write_text(text.replace('"x"', json.dumps(str(KEY))))
    assert read_level(path, KEY, 0.0) == 1.0
    add_level(path, KEY, 2.0, 0.0)
    assert read_level(path, KEY, 0.0) == 2.0


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").touch()
    add_level(tmp_path / "file" / "levels.json", KEY, 2.0, 0.0)


def test_a_term_that_was_not_seen_stays_as_it_was(path):
    add_levels(path, KEY, SeenLevels(reading=2.0), 0.0)
    assert read_levels(path, KEY, 0.0) == Levels(reading=2.0)
    add_levels(path, KEY, SeenLevels(computing=3.0), LASTS_S)
    assert read_levels(path, KEY, LASTS_S) == Levels(reading=2.0, computing=3.0)
    late = LASTS_S + 1.0
    assert read_levels(path, KEY, late) == Levels(computing=3.0)  # each has its own hour
    add_levels(path, KEY, SeenLevels(), late)
    assert read_levels(path, KEY, late) == Levels(computing=3.0)
    other = replace(KEY, model="other")
    add_levels(path, other, SeenLevels(computing=1.5), LASTS_S)
    assert read_levels(path, other, LASTS_S) == Levels(reading=2.0, computing=1.5)


def test_few_or_short_passes_say_nothing():
    pace = Pace()
    for _ in range(7):
        pace.add(Took(1, 1, 0.2, 0.1))
        pace.add(Took(9, 1, 0.3, 0.0))
    assert not pace.kinds
    pace.add(Took(1, 1, 60.0, 50.0))  # a hiccup
    for rows in (8, 5):
        pace.add(Took(1, rows, 0.5, 0.1))  # others, which are fewer
    assert pace.kinds == [Took(1, 1, pytest.approx(0.2), pytest.approx(0.1))]
    pace.add(Took(16, 1, 0.3, 0.0))  # about as many
    assert [took.running for took in pace.kinds] == [1, 9]
    tiny = Took(1, 1, 0.05, 0.01)
    short = lambda levels: SimpleNamespace(pass_s=0.01, stall_s=0.005)  # noqa: E731
    assert levels_of(tiny, short, Levels()) == SeenLevels()


def test_a_level_is_that_of_about_as_many_sequences(path):
    """What many rows take is another guess than what copies take: one says little of the other."""
    many, few = replace(KEY, running=16), replace(KEY, running=4)
    add_level(path, many, 3.0, 0.0)
    assert read_level(path, many, 0.0) == 3.0
    assert read_level(path, replace(many, model="other"), 0.0) == 3.0
    assert read_level(path, few, 0.0) == 1.0 == read_level(path, KEY, 0.0)
    add_level(path, KEY, 1.5, 0.0)
    assert read_level(path, few, 0.0) == 1.5  # the hour is as bad for them
    assert read_level(path, many, 0.0) == 3.0
    assert read_level(path, replace(KEY, streams=False, running=16), 0.0) == 1.0


def test_what_was_kept_before_is_that_of_one_sequence(path):
    path.parent.mkdir()
    name = "box of 2026, cpu, 2 threads, streamed, plain weights, big of 9 bytes"
    path.write_text(json.dumps({"version": 1, "entries": {name: [2.0, 0.0]}}))
    assert read_level(path, KEY, 0.0) == 2.0
    add_level(path, replace(KEY, running=16), 3.0, 0.0)
    assert read_level(path, KEY, 0.0) == 2.0


def planned(checkpoint, draft, level):
    means = Means(
        speeds=speeds(1e8),
        yields=lambda c: expected_yield(c.kind),
        level=lambda streams, running: Levels(reading=level, computing=level),
    )
    return plan_run(
        checkpoint,
        RuntimeConfig(device="cpu", resident_layers=1),
        CPU,
        load=RunLoad(
            capacities=[150], prompt_tokens=100, drafting=Drafting(DraftConfig(draft=draft))
        ),
        free=FREE,
        means=means,
    )


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_all_times_of_a_plan_follow_the_level_and_no_choice_does(make_tiny, draft):
    checkpoint = open_checkpoint(make_tiny("llama", num_hidden_layers=4))
    plain, slow = (planned(checkpoint, draft, level) for level in (1.0, 3.0))
    assert (slow.level, slow.placement) == (pytest.approx(3.0), plain.placement)
    assert (slow.drafting, slow.first_nodes) == (plain.drafting, plain.first_nodes)
    for name in ("s_per_token", "pass_s", "draft_s", "compute_s", "stall_s"):
        before, after = (getattr(plan.prediction, name) for plan in (plain, slow))
        assert after == pytest.approx(3.0 * before)
    for before, after in zip(plain.outlooks, slow.outlooks, strict=True):
        assert (after.nodes, after.tokens) == (before.nodes, before.tokens)
        assert after.pass_s == pytest.approx(3.0 * before.pass_s)


def test_runs_correct_what_plan_says_and_it_says_so(deep_model, offload_run, monkeypatch):
    """A run whose passes computed three times as long as the profile says, and waited twice."""
    from offload_rt.planning import levels
    from offload_rt.planning.planner import Plan

    foretold = Plan.foretold
    monkeypatch.setattr(levels, "_LEAST_S", 0.0)
    monkeypatch.setattr(Pace, "kinds", [Took(1, 1, 5.0, 2.0), Took(16, 1, 3.0, 0.0)])

    def price(plan, nodes, running, levels, asked=None):
        foretold(plan, nodes, running, levels, asked)  # it can be
        stall_s = levels.reading if running == 1 else 0.0
        return SimpleNamespace(pass_s=levels.computing + stall_s, stall_s=stall_s)

    monkeypatch.setattr(Plan, "foretold", price)
    place = ("--device", "cpu", "--draft", "none", "--resident-layers", 1)
    asked = ("plan", deep_model, *place, "--context", 32)
    before = json.loads(offload_run(*asked, "--json").out)
    done = offload_run(
        "generate", deep_model, "-p", "the", "-n", 4, *place, "--ignore-eos", "--json"
    )
    assert done.code == 0, done.err
    after = json.loads(offload_run(*asked, "--json").out)
    assert (before["level"], before["levels"]) == (1.0, {"reading": 1.0, "computing": 1.0})
    assert after["levels"] == pytest.approx({"reading": 2.0, "computing": 3.0}, rel=1e-2)
    slow, fast = (made["predicted"] for made in (after, before))
    assert slow["compute_s"] == pytest.approx(3.0 * fast["compute_s"], rel=1e-2)
    assert after["level"] == pytest.approx(slow["pass_s"] / fast["pass_s"])
    assert "corrected by recent runs: reading x2.00, computing x3.00" in offload_run(*asked).out
    kept = json.loads(levels_path().read_text())["entries"]
    one, many = kept
    assert f"cpu, {compute_threads()} threads, streamed, plain weights, {deep_model.name}" in one
    assert (
        f"cpu, {compute_threads()} threads, streamed by 16, plain weights, {deep_model.name}"
        in many
    )
    assert kept[many].keys() == {"computing"}
    other = ("plan", deep_model, *place, "--context", 32, "--profile", PROFILE.name)
    levels_path().write_text(levels_path().read_text().replace("streamed", "resident"))
    assert "corrected" not in offload_run(*other).out


@pytest.mark.parametrize("fails", [False, True])
def test_what_cannot_be_priced_ends_no_run(deep_model, monkeypatch, fails):
    """Neither one that is done nor one that has an error of its own."""
    from offload_rt.errors import CapacityError, PlanError
    from offload_rt.planning.planner import Plan

    def refuse(*asked, **more):
        raise PlanError("no such step")

    monkeypatch.setattr(Pace, "kinds", [Took(1, 1, 5.0, 2.0)])
    monkeypatch.setattr(Plan, "foretold", refuse)
    model = offload_rt.load(deep_model, device="cpu", draft="none", resident_layers=1)
    with pytest.raises(CapacityError, match="its own") if fails else nullcontext(), model:
        assert model.generate("the", max_tokens=2).token_ids
        if fails:
            raise CapacityError("its own")
    assert not levels_path().exists()


def test_an_engine_tells_what_passes_took_and_waited(deep_model):
    slow = {"home": HomeKind.HOST, "link_bytes_per_s": 1e7}
    with engine_for(deep_model, resident_layers=1, **slow) as engine:
        generate(engine, tokens=12)
        (took,) = engine.pace.kinds
        assert (took.running, took.rows) == (1, 1)
        assert 0.0 < took.stall_s < took.pass_s


def test_each_number_of_sequences_has_its_own_level_in_a_plan(make_tiny):
    """Of 16 at once that are planned for one: what drafts of one take is as it is alone."""
    checkpoint = open_checkpoint(make_tiny("llama", num_hidden_layers=4))

    def made(level):
        means = Means(speeds=speeds(1e8), yields=lambda c: expected_yield(c.kind), level=level)
        load = RunLoad(
            capacities=[150] * 16,
            prompt_tokens=100,
            drafting=Drafting(DraftConfig(draft="ngram")),
            kv_tokens=150 * 16,
            running=1,
        )
        runtime = RuntimeConfig(device="cpu", resident_layers=1)
        return plan_run(checkpoint, runtime, CPU, load=load, free=FREE, means=means)

    plain = made(lambda streams, running: Levels())
    slow = made(
        lambda streams, running: (
            Levels(reading=3.0, computing=3.0)
            if running == 16
            else Levels(reading=1.5, computing=1.5)
        )
    )
    assert (slow.level, slow.drafting) == (pytest.approx(1.5), plain.drafting)
    assert slow.prediction.pass_s == pytest.approx(1.5 * plain.prediction.pass_s)
    for before, after in zip(plain.alone, slow.alone, strict=True):
        assert after.pass_s == pytest.approx(1.5 * before.pass_s)
    for before, after in zip(plain.outlooks, slow.outlooks, strict=True):
        assert after.pass_s == pytest.approx(3.0 * before.pass_s)


GIB = 2**30
SIZES = (1.5, 2, 3, 4, 5.4, 8)  # GiB, of memory for the mixture


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """64 experts, of which a token has 4: 10 GB."""
    folder = tmp_path_factory.mktemp("mixture")
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "num_local_experts": 64,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return outline_checkpoint(folder)


def slower(profile, reading, computing):
    """A machine that reads and computes so many times as long."""

    def longer(record, field):
        number = getattr(record, field)
        return replace(record, **{field: replace(number, value=computing * number.value)})

    def curve(record):
        return replace(record, times=tuple(longer(time, "layer_s") for time in record.times))

    def disk(record):
        rate = record.bytes_per_s
        return replace(record, bytes_per_s=replace(rate, value=rate.value / reading))

    return replace(
        profile,
        layers=tuple(map(curve, profile.layers)),
        heads=tuple(map(curve, profile.heads)),
        attention=tuple(longer(each, "s_per_kv_byte") for each in profile.attention),
        disk=tuple(map(disk, profile.disk)),
    )


def plan_of(mixture, gib, profile=PROFILE, level=lambda streams, running: Levels()):
    return plan_run(
        mixture,
        RuntimeConfig(device="cpu", device_limit_bytes=int(gib * GIB)),
        CPU,
        load=RunLoad(capacities=[150], prompt_tokens=100),
        free=FreeMemory(device_bytes=64 * GIB, host_bytes=64 * GIB),
        means=Means(speeds=speeds_of(profile, Processor.CPU), level=level),
    )


def run_of(true, made):
    """What passes take on a machine that a plan does not know, and what that says.

    Args:
        true: plan of a profile of that machine.
        made: plan of the profile that is there.
    """
    took = Took(1, 1, true.prediction.pass_s, true.prediction.stall_s)
    return took, levels_of(took, partial(made.foretold, 0, 1), Levels())


@pytest.fixture(scope="module")
def known_plans(mixture):
    """Plans for each memory, of the profile that is there."""
    return {gib: plan_of(mixture, gib) for gib in SIZES}


@pytest.mark.parametrize(
    ("reading", "computing", "sizes"),
    [(2.0, 1.0, SIZES[::2]), (6.0, 3.0, SIZES[1::2]), (1.0, 2.0, SIZES), (0.7, 1.6, SIZES)],
)
def test_a_run_with_one_memory_corrects_plans_of_any_other(
    mixture, known_plans, path, reading, computing, sizes
):
    """Of a machine that reads and computes so many times as long as its profile says.

    Where it computes longer than it reads, no run but those with the least memory waits for a
    tenth of its passes: then nothing of reading is learned. Where all learn, two machines have
    half of the memories each. Each is corrected by another, an odd number of places apart.
    """
    machine = slower(PROFILE, reading, computing)
    true = {gib: plan_of(mixture, gib, machine) for gib in sizes}
    learned, corrected = set(), set()
    for number, gib in enumerate(sizes):
        took, seen = run_of(true[gib], known_plans[gib])
        if None in (seen.reading, seen.computing):
            assert seen.reading is None and took.stall_s < 0.1 * took.pass_s
            continue
        learned.add(gib)
        known = path.with_name(f"{gib}.json")
        add_levels(known, KEY, seen, 0.0)
        levels = read_levels(known, KEY, 0.0)
        others = sizes[(number + 1) % 2 :: 2]
        corrected |= {*others}
        for other in others:
            said = plan_of(mixture, other, level=lambda s, r, at=levels: at).prediction
            expected = true[other].prediction.s_per_token
            assert said.s_per_token == pytest.approx(expected, rel=0.05), (gib, other)
    assert corrected == {*sizes}
    assert learned == {*(sizes if reading > computing else SIZES[:2])}


def test_a_run_that_hardly_reads_says_nothing_of_reading(mixture):
    """Nor one that hardly computes of computing: a plan of other memory keeps what it knew."""
    machine = slower(PROFILE, 3.0, 2.0)
    _, seen = run_of(plan_of(mixture, 9.5, machine), plan_of(mixture, 9.5))
    assert (seen.reading, seen.computing) == (None, pytest.approx(2.0, rel=0.02))
    quick = slower(PROFILE, 1.0, 0.05)
    true = plan_of(mixture, 1.5, slower(quick, 3.0, 1.2))
    took, seen = run_of(true, plan_of(mixture, 1.5, quick))
    assert took.stall_s > 0.9 * took.pass_s
    assert (seen.reading, seen.computing) == (pytest.approx(3.0, rel=0.05), None)
