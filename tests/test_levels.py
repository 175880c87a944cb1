"""What runs say of the hour: kept, bounded, forgotten, and every prediction follows it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import FREE, PROFILE, speeds

from offload_rt.config import DraftConfig, RuntimeConfig
from offload_rt.costs.drafters import Drafting
from offload_rt.device.kinds import CPU
from offload_rt.device.system import compute_threads
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.levels import LASTS_S, LEAST, MOST, LevelKey, Pace, add_level, read_level
from offload_rt.planning.planner import Means, plan_run
from offload_rt.planning.yields import expected_yield
from offload_rt.session.means import levels_path

KEY = LevelKey(machine="box of 2026, cpu, 2 threads", streams=True, model="big of 9 bytes")
HOUR = 3600.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "levels.json"


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


def test_few_or_short_passes_say_nothing():
    pace = Pace()
    for _ in range(7):
        pace.add(0.2, 0.1, 1)
        pace.add(0.3, 0.1, 9)
    assert not pace.ratios
    pace.add(60.0, 0.1, 1)  # a hiccup
    assert pace.ratios == {1: 2.0}
    pace.add(0.3, 0.1, 16)  # about as many
    assert pace.ratios == {1: 2.0, 16: pytest.approx(3.0)}
    tiny = Pace()
    for _ in range(50):
        tiny.add(0.01, 0.001, 1)
    assert not tiny.ratios


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
    name = "box of 2026, cpu, 2 threads, streamed, big of 9 bytes"
    path.write_text(json.dumps({"version": 1, "entries": {name: [2.0, 0.0]}}))
    assert read_level(path, KEY, 0.0) == 2.0
    add_level(path, replace(KEY, running=16), 3.0, 0.0)
    assert read_level(path, KEY, 0.0) == 2.0


def planned(checkpoint, draft, level):
    means = Means(
        speeds=speeds(1e8),
        yields=lambda c: expected_yield(c.kind),
        level=lambda streams, running: level,
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
    assert (slow.level, slow.placement) == (3.0, plain.placement)
    assert (slow.drafting, slow.first_nodes) == (plain.drafting, plain.first_nodes)
    for name in ("s_per_token", "pass_s", "draft_s", "compute_s", "stall_s"):
        before, after = (getattr(plan.prediction, name) for plan in (plain, slow))
        assert after == pytest.approx(3.0 * before)
    for before, after in zip(plain.outlooks, slow.outlooks, strict=True):
        assert (after.nodes, after.tokens) == (before.nodes, before.tokens)
        assert after.pass_s == pytest.approx(3.0 * before.pass_s)
    assert slow.profile_pass_s(0, 1) == pytest.approx(plain.profile_pass_s(0, 1))


def test_runs_correct_what_plan_says_and_it_says_so(tiny_model, offload_run, monkeypatch):
    """A run whose passes took three times as long as the profile says."""
    from offload_rt.engine import Engine

    place = ("--device", "cpu", "--draft", "none", "--resident-layers", 1)
    asked = ("plan", tiny_model, *place, "--context", 32)
    before = json.loads(offload_run(*asked, "--json").out)
    monkeypatch.setattr(Engine, "pace", Triple(), raising=False)
    done = offload_run(
        "generate", tiny_model, "-p", "the", "-n", 4, *place, "--ignore-eos", "--json"
    )
    assert done.code == 0, done.err
    after = json.loads(offload_run(*asked, "--json").out)
    assert (before["level"], after["level"]) == (1.0, 3.0)
    slow, fast = (made["predicted"]["s_per_token"] for made in (after, before))
    assert slow == pytest.approx(3.0 * fast)
    assert "corrected by recent runs: x3.00" in offload_run(*asked).out
    kept = json.loads(levels_path().read_text())["entries"]
    one, many = kept
    assert f"cpu, {compute_threads()} threads, streamed, {tiny_model.name}" in one
    assert f"cpu, {compute_threads()} threads, streamed by 16, {tiny_model.name}" in many
    other = ("plan", tiny_model, *place, "--context", 32, "--profile", PROFILE.name)
    levels_path().write_text(levels_path().read_text().replace("streamed", "resident"))
    assert "corrected" not in offload_run(*other).out


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

    plain = made(lambda streams, running: 1.0)
    slow = made(lambda streams, running: 3.0 if running == 16 else 1.5)
    assert (slow.level, slow.drafting) == (1.5, plain.drafting)
    assert slow.prediction.pass_s == pytest.approx(1.5 * plain.prediction.pass_s)
    for before, after in zip(plain.alone, slow.alone, strict=True):
        assert after.pass_s == pytest.approx(1.5 * before.pass_s)
    for before, after in zip(plain.outlooks, slow.outlooks, strict=True):
        assert after.pass_s == pytest.approx(3.0 * before.pass_s)
    for running in (1, 5, 16):
        expected = plain.profile_pass_s(4, running)
        assert slow.profile_pass_s(4, running) == pytest.approx(expected)


class Triple:
    """A pace that an engine cannot change."""

    ratios = {1: 3.0, 16: 2.0}

    def __set__(self, engine, value):
        pass

    def __get__(self, engine, kind):
        return self

    def add(self, pass_s, predicted_s, running):
        assert pass_s > 0.0 and predicted_s > 0.0 and running == 1
