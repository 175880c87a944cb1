"""What is planned and expected of experts that come one by one."""

import json
import random
from collections import deque
from dataclasses import replace
from itertools import product
from math import inf
from types import SimpleNamespace

import pytest
from engines import engine_for, generate
from expert_models import make_mixture
from quantised import write_gpt_oss
from test_experts import lend, pool_of
from test_planner import plan
from test_workload import CPU as CPU_SPEEDS
from test_workload import GPU

from offload_rt.config import Exact, ExpertMisses, LookAhead
from offload_rt.costs.experts import (
    IN_VAIN,
    Distances,
    ExpertUse,
    chances_of,
    choosing_s,
    prior_hit_rate,
    union,
)
from offload_rt.costs.timeline import TimedLayer, TimedPass, steady_pass
from offload_rt.costs.workload import PlacedModel, PooledExperts, Residence, parts_of
from offload_rt.device.base import STAGING_BYTES
from offload_rt.device.kinds import CUDA
from offload_rt.entries import read_entries, write_entries
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored
from offload_rt.planning.history import add_asked, model_key, read_asked, use_of
from offload_rt.profiling.store import find_profile, load_profile
from offload_rt.session.means import asked_path
from offload_rt.streaming import direct_io
from offload_rt.streaming.experts import PROMPTS, ExpertCounts, ExpertPool, MissRates
from offload_rt.units import format_rate

LARGE = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 32, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(make_tiny):
    return make_mixture(make_tiny, "qwen3_moe", tokenizer=True, **LARGE)


def planned(offload_run, folder, *more):
    """The JSON of `plan`."""
    asked = ("plan", folder, "--context", 64, "--draft", "none", "--json", *more)
    done = offload_run(*asked)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_plan_says_what_is_expected_of_experts(offload_run, folder):
    found = planned(offload_run, folder, "--expert-slots", 64)
    experts, predicted = found["experts"], found["predicted"]
    assert (experts["slots"], experts["experts"], experts["per_token"]) == (64, 128, 2)
    assert experts["share"] == 0.5 and experts["hit_rate"] == pytest.approx(0.84)
    expert_bytes = 3 * 256 * 256 * 2
    misses = 4 * 2 * (1 - 0.84)
    assert experts["bytes_per_token"] == pytest.approx(misses * expert_bytes, rel=1e-3)
    assert predicted["home_bytes"] == found["bytes_per_pass"] == experts["bytes_per_token"]
    idle = (128 - 4 * 2) * 3 * 256 * 256
    assert experts["total_parameters"] - experts["active_parameters"] == idle
    assert found["resident"] == [0, 1, 2, 3] and not found["streamed"]
    rate = experts["bytes_per_s"]
    assert rate == pytest.approx(predicted["home_bytes"] / predicted["transfer_s"])
    table = " ".join(offload_run("plan", folder, "--context", 64, "--expert-slots", 64).out.split())
    assert "84% of a token's experts expected in the slots" in table
    assert f"read per token at {format_rate(rate)}" in table
    simulated = offload_run(
        *("simulate", folder, "--profile", "cpu-2core-avx512bf16", "--context", 64),
        *("--draft", "none", "--expert-slots", 64),
    )
    assert simulated.code == 0 and "64 slots of experts" in simulated.out


def test_a_gpu_has_slots_over_host_memory_and_waits_for_the_host(offload_run, folder):
    found = {}
    for slots in (16, 128):
        done = offload_run(
            *("simulate", folder, "--profile", "rtx4090-pcie4x16", "--context", 64, "--json"),
            *("--draft", "none", "--expert-slots", slots),
        )
        assert done.code == 0, done.err
        found[slots] = json.loads(done.out)
    some, all_of_them = found[16], found[128]
    assert (
        some["home"] == "host"
        and some["host_bytes"] - some["host_base_bytes"] == 128 * 3 * 256 * 256 * 2
    )
    assert some["bytes_per_pass"] > 0 == all_of_them["bytes_per_pass"]
    # The host asks in each of four layers, and launches kernels for two experts.
    assert all_of_them["compute_s"] >= 4 * (30e-6 + 2 * 60e-6)


def test_more_slots_read_less_and_take_no_longer(offload_run, folder):
    made = [planned(offload_run, folder, "--expert-slots", n) for n in (2, 8, 32, 64, 128)]
    read = [one["experts"]["bytes_per_token"] for one in made]
    seconds = [one["predicted"]["s_per_token"] for one in made]
    assert read == sorted(read, reverse=True) and read[-1] == 0 < read[-2]
    assert seconds == sorted(seconds, reverse=True)


def test_a_plan_says_why_layers_are_whole(offload_run, folder):
    small = ("--device-memory", "140MiB")
    assert planned(offload_run, folder, *small)["experts"] is not None
    whole = planned(offload_run, folder, *small, "--expert-slots", 0)
    assert whole["experts"] is None and whole["whole_because"] == "--expert-slots is 0"
    asked = planned(offload_run, folder, *small, "--resident-layers", 1)
    assert asked["whole_because"] == "--slots and --resident-layers are of whole layers"


def test_too_few_slots_end_with_code_3_and_the_number(offload_run, folder):
    done = offload_run("plan", folder, "--expert-slots", 1)
    assert done.code == 3 and "2 experts of a layer at once: use 2 or more" in done.err


@pytest.mark.parametrize(
    ("draft", "way_out"),
    [
        (("triforce", "--retrieval-weights", "int8"), "use --retrieval-weights same"),
        (("self:int8",), "use another drafter"),
    ],
)
def test_copies_that_draft_are_refused_beside_slots_with_a_way_out_that_works(
    offload_run, folder, draft, way_out
):
    asked = ("plan", folder, "--context", 64, "--expert-slots", 40, "--draft-tokens", 4)
    asked += ("--json",)
    done = offload_run(*asked, "--draft", *draft)
    named = " ".join(("--draft", *draft))
    assert done.code == 3 and named.removesuffix(":int8") in done.err and way_out in done.err
    other = ("triforce", "--retrieval-weights", "same") if len(draft) > 1 else ("ngram",)
    assert offload_run(*asked, "--draft", *other).code == 0


def test_a_plan_that_is_kept_is_run_as_it_was(offload_run, folder, tmp_path):
    path = tmp_path / "plan.json"
    planned(offload_run, folder, "--expert-slots", 40, "--output", path)
    asked = ("generate", folder, "-p", "the dog", "-n", 5, "--json")
    done = offload_run(*asked, "--plan", path)
    assert done.code == 0, done.err
    experts = json.loads(done.out)["experts"]
    assert sum(experts["distances"]) == 4 * 4 * 2
    assert experts["slots"] == 40 and experts["hits"] + experts["misses"] == 4 * 4 * 2


def test_a_report_counts_what_was_asked_for(folder):
    with engine_for(folder, expert_slots=24, prefill_chunk_tokens=5) as engine:
        generate(engine)
        pool = engine.runner.experts
        # A prompt of 17 in chunks of 5, the last of 2 rows; 15 tokens.
        assert pool.counts.calls == {PROMPTS + 3: 4 * 3, PROMPTS + 1: 4, 0: 4 * 15}
        assert sum(map(sum, pool.counts.distances.values())) == pool.counts.hits + (
            pool.counts.misses
        )


def test_a_report_says_how_much_came_from_files(offload_run, folder):
    """Where some experts are in host memory, and others in their files."""
    asked = ("generate", folder, "-p", "the dog", "-n", 9, "--ignore-eos", "--draft", "none")
    asked += ("--temperature", 2, "--seed", 1, "--expert-slots", 12, "--look-ahead", "off")
    split = ("--home", "split", "--host-memory", "25MiB")
    done = offload_run(*asked, *split, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    experts, moved = found["experts"], found["experts"]["bytes_per_token"] * 8
    assert min(experts["host_bytes"], experts["file_bytes"]) > 0
    assert experts["host_bytes"] + experts["file_bytes"] == pytest.approx(moved)
    share = experts["file_bytes"] / moved
    table = " ".join(offload_run(*asked, *split).err.split())
    assert f"read per token, {share:.0%} of it from files" in table
    table = " ".join(offload_run(*asked).err.split())
    assert "read per token" in table and "from files" not in table


@pytest.mark.parametrize("slots", [24, 0])
def test_reads_through_the_page_cache_are_said(offload_run, folder, monkeypatch, slots):
    """And work; where direct reads do, nothing is said."""
    asked = ("--draft", "none", "--expert-slots", slots)
    if not slots:
        asked += ("--resident-layers", 1)
    run = ("generate", folder, "-p", "the dog", "-n", 3, *asked)
    direct = offload_run(*run)
    assert direct.code == 0 and "page cache" not in direct.err
    monkeypatch.setattr(direct_io, "_direct_works", lambda fd, *, writes: False)
    buffered = offload_run(*run)
    assert buffered.out == direct.out
    what = "experts" if slots else "streamed layers"
    for done in (buffered, offload_run("plan", folder, "--context", 64, *asked)):
        assert done.code == 0, done.err
        assert done.err.count(f"{what} are read through the page cache") == 1


def test_what_a_prompt_misses_says_nothing_of_drafts():
    """Passes of as many rows: those of a prompt are new to the pool, those of a draft are not."""
    drafts, prompts = Distances(calls=9, counts=(0, 18, 0)), Distances(calls=9, counts=(0, 0, 36))
    use = ExpertUse(seen={4: drafts, PROMPTS + 4: prompts})
    assert use.misses(12, 1, experts=4, per_token=2) == 2.0
    assert use.misses(12, 1, experts=4, per_token=2, prompt=True) == 4.0
    only = ExpertUse(seen={PROMPTS + 4: prompts})
    assert only.misses(12, 1, 4, 2) == ExpertUse().misses(12, 1, 4, 2)


@pytest.mark.parametrize("reads_prompt", [True, False])
def test_what_a_pass_reads_is_priced_of_its_own_kind(folder, reads_prompt):
    checkpoint = open_checkpoint(folder)
    prompts = {PROMPTS + 2: Distances(calls=1, counts=(*[0] * 31, 1, 7))}
    use = ExpertUse(seen=prompts | {2: Distances(calls=1, counts=(*[0] * 31, 1, 1))})
    pooled = PooledExperts(
        counts=(32,) * 4, per_token=2, held=8, home_bytes=100, image_bytes=100, use=use
    )
    model = PlacedModel(
        parts=parts_of(checkpoint, "bfloat16", CPU_SPEEDS.device),
        speeds=CPU_SPEEDS,
        residence=Residence(experts=pooled),
        context_tokens=64,
    )
    found = model.load(4, reads_prompt=reads_prompt).layers
    assert {layer.missed_bytes for layer in found} == {800 if reads_prompt else 200}


def test_expected_misses_are_bounded_by_what_is_asked_for():
    use = ExpertUse()
    for held in (0, 4, 16, 40, 64):
        before = 0.0
        for rows in (1, 2, 4, 8, 16, 64):
            misses = use.misses(rows, held, experts=64, per_token=4)
            assert before <= misses <= union(rows, 64, 4) + 1e-9 <= 64 + 1e-9
            assert misses <= rows * use.misses(1, held, 64, 4) + 1e-9
            before = misses
    assert use.misses(1, 0, 64, 4) == 4 and use.misses(8, 64, 64, 4) == 0
    assert union(1, 64, 4) == pytest.approx(4)


def test_seen_distances_say_the_misses_of_any_pool():
    seen = Distances(calls=10, counts=(12, 8, 5, 3, 2))
    assert [seen.misses(held) for held in range(5)] == [3.0, 1.8, 1.0, 0.5, 0.2]
    assert seen.misses(1.5) == pytest.approx(1.4)
    use = ExpertUse(seen={0: seen})
    assert use.misses(1, 2, experts=4, per_token=3) == 1.0
    # Of passes of two rows nothing was seen: less than twice the misses of one.
    assert 1.0 < use.misses(2, 2, experts=4, per_token=3) < 2.0


def test_before_any_run_few_experts_are_few_tokens_worth():
    """Half of Mixtral's 8 experts are two tokens' worth, half of 128 eight."""
    assert prior_hit_rate(4, 8, 2) == pytest.approx(0.5 + 0.5 * 0.285)
    assert prior_hit_rate(64, 128, 8) == pytest.approx(0.84)
    for experts, per_token in ((8, 2), (64, 4), (512, 10)):
        rates = [prior_hit_rate(held, experts, per_token) for held in range(experts + 1)]
        assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(1)
        assert all(rate >= held / experts - 1e-9 for held, rate in enumerate(rates) if held)


def counted(calls, distances, uses=None):
    return use_of(ExpertCounts(calls=calls, distances=distances, uses=uses or {}))


def test_what_a_run_asked_for_is_kept_by_model_and_fades(tmp_path):
    path = tmp_path / "experts.json"
    assert not read_asked(path, "a").seen
    add_asked(path, "a", counted({0: 100, 3: 500}, {0: [50, 30, 20], 3: [900, 50, 50]}))
    assert read_asked(path, "a").seen == {3: Distances(calls=500, counts=(900, 50, 50))}
    add_asked(path, "a", counted({0: 100}, {0: [70, 10, 20]}))
    found = read_asked(path, "a").seen[0]
    assert (found.calls, found.counts) == (200, (120, 40, 40))
    assert not read_asked(path, "b").seen
    add_asked(path, "a", counted({0: 2**16}, {0: [0, 0, 2**17]}))
    assert read_asked(path, "a").seen[0].counts == (0, 0, 2**17)  # nothing is left of the first
    path.write_text(path.read_text().replace("131072.0", '"many"'))
    assert not read_asked(path, "a").seen


def kept_uses(path, *runs):
    """What is known of a model after runs that asked for experts so often."""
    for uses in runs:
        add_asked(path, "m", counted({0: 10}, {0: [10, 10, 10]}, uses))
    return {layer: [*own] for layer, own in read_asked(path, "m").uses.items()}


def test_how_often_experts_were_asked_for_is_kept_in_a_byte_each_and_fades(tmp_path):
    path = tmp_path / "experts.json"
    few = {0: [3, 0, 200], 2: [1, 2, 3, 4]}
    assert kept_uses(path, few) == few
    # A layer's are halved together; what one run asked for a thousand times is no more than 255.
    assert kept_uses(path, {0: [997, 0, 0], 2: [0] * 4})[0] == [250, 0, 50]
    assert kept_uses(path, *[{0: [0, 200, 0], 2: [0] * 4}] * 9) == {0: [0, 200, 0], 2: [1, 2, 3, 4]}
    assert kept_uses(path, {0: [1, 2]}) == {0: [1, 2]}  # another model by the same name
    assert kept_uses(path, dict.fromkeys(range(129), [1] * 256)) == {}  # more than are kept


@pytest.mark.parametrize(
    ("whole", "broken"),
    [*(('"0102"', each) for each in ('"zz"', "7", "[1, 2]", "null")), ("[10,", f"[1{'0' * 400},")],
)
def test_a_damaged_history_of_uses_is_none(tmp_path, whole, broken):
    path = tmp_path / "experts.json"
    assert kept_uses(path, {0: [1, 2]}) == {0: [1, 2]}
    assert whole in path.read_text()
    path.write_text(path.read_text().replace(whole, broken))
    assert read_asked(path, "m") == ExpertUse()
    assert kept_uses(path, {0: [0, 2]}) == {0: [0, 2]}  # and is made anew


def test_a_history_is_never_too_large_to_be_read(tmp_path):
    """The models used last stay, as many as fit."""
    path, names = tmp_path / "experts.json", [f"m{index}" for index in range(8)]
    write_entries(path, dict.fromkeys(names, "x" * 200_000), most=7)
    assert [*read_entries(path, str)] == names[3:]


def test_an_older_history_has_no_uses(tmp_path):
    path = tmp_path / "experts.json"
    entry = {"0": [300.0, 200.0, 50.0, 50.0]}
    path.write_text(json.dumps({"version": 1, "entries": {"m": entry}}))
    found = read_asked(path, "m")
    assert found.seen[0].counts == (200, 50, 50) and not found.uses


def routed(tokens, seed, repeat=0.5, experts=64, per_token=4):
    """Experts of tokens after each other; about that share of them were the token's before."""
    dice, recent = random.Random(seed), dice_order(seed, experts)
    for _ in range(tokens):
        chosen = dict.fromkeys(e for e in recent[:per_token] if dice.random() < repeat)
        while len(chosen) < per_token:
            at = min(experts - 1, int(dice.expovariate(1 / 14)))
            chosen[recent[at]] = None
        recent = [*chosen, *(e for e in recent if e not in chosen)]
        yield list(chosen)


def dice_order(seed, experts):
    order = list(range(experts))
    random.Random(seed + 99).shuffle(order)
    return order


@pytest.mark.parametrize("repeat", [0.55, 0.2])
def test_one_run_says_the_hits_and_bytes_of_others_in_pools_of_other_sizes(tmp_path, repeat):
    """As `plan` after a run: other texts, other sizes, within 15 %; recorded ones: RESULTS.md."""
    path, counts = tmp_path / "experts.json", {0: 64}

    def run(share, seed):
        pool = pool_of(counts, share, per_token=4)[0]
        texts = [list(routed(1260, seed + layer, repeat)) for layer in counts]
        for layer, text in enumerate(
            texts
        ):  # a prompt: all at once, what was used last as the last
            asked = reversed(dict.fromkeys(e for row in reversed(text[:60]) for e in row))
            deque(lend(pool, layer, list(asked), rows=60), maxlen=0)
        before = pool.counts.hits, pool.counts.misses
        for token in range(60, 1260):
            for layer, text in enumerate(texts):
                deque(lend(pool, layer, text[token]), maxlen=0)
        return pool.counts, pool.counts.hits - before[0], pool.counts.misses - before[1]

    counts_of_one, *_ = run(share=16, seed=1)
    add_asked(path, "m", use_of(counts_of_one))
    use = read_asked(path, "m")
    for share in (6, 24, 32):
        _, hits, misses = run(share, seed=500)
        seen = misses / (hits + misses) * 4
        said = use.misses(1, share, experts=64, per_token=4)
        assert said == pytest.approx(seen, rel=0.15)
        assert 1 - said / 4 == pytest.approx(1 - seen / 4, rel=0.15)


def test_hits_that_are_stated_are_priced_as_those_that_were_seen(offload_run, folder):
    """One road: 0.8 by hand, and runs of which as many were in 10 slots a layer."""
    asked = ("simulate", folder, "--profile", "cpu-2core-avx512bf16", "--context", 64, "--json")
    asked += ("--expert-slots", 40)
    stated = offload_run(*asked, "--expert-hits", 0.8)
    assert stated.code == 0, stated.err
    counts = [0] * 33
    counts[3], counts[20] = 1600, 400
    key = model_key(open_checkpoint(folder))
    add_asked(asked_path(), key, counted({0: 1000}, {0: counts}))
    seen = json.loads(offload_run(*asked).out)
    stated = json.loads(stated.out)
    for key in ("s_per_token", "bytes_per_pass"):
        assert stated[key] == pytest.approx(seen[key], rel=1e-6)
    assert stated["experts"]["hit_rate"] == pytest.approx(0.8)
    assert stated["experts"]["stated"] and not seen["experts"]["stated"]
    words = offload_run(*asked[:-3], *asked[-2:], "--expert-hits", 0.8).out
    assert "80% of a token's experts expected in the slots (as stated)" in " ".join(words.split())
    whole = offload_run(*asked[:-2], "--expert-slots", 0, "--expert-hits", 0.8)
    assert whole.code == 2 and "--expert-hits has no effect" in whole.err


def test_a_plan_after_a_run_is_of_what_the_run_asked_for(offload_run, folder):
    before = planned(offload_run, folder, "--expert-slots", 40)["experts"]
    assert not before["measured"]
    asked = ("generate", folder, "-p", "the dog", "-n", 54, "--ignore-eos", "--json")
    done = offload_run(*asked, "--expert-slots", 64, "--draft", "none")
    assert done.code == 0, done.err
    counts = json.loads(done.out)["experts"]["distances"]
    after = planned(offload_run, folder, "--expert-slots", 40)["experts"]
    assert after["measured"]
    assert after["hit_rate"] == pytest.approx(sum(counts[:10]) / sum(counts), abs=1e-6)
    assert after["bytes_per_token"] != before["bytes_per_token"]
    asked = ("simulate", folder, "--context", 64, "--expert-slots", 40, "--json")
    simulated = json.loads(offload_run(*asked).out)["experts"]  # as it was learnt, too
    assert simulated["hit_rate"] == after["hit_rate"] and simulated["measured"]
    assert simulated["bytes_per_token"] == after["bytes_per_token"]
    table = offload_run("plan", folder, "--context", 64, "--expert-slots", 40).out
    assert "expected in the slots (as seen)" in " ".join(table.split())


def test_a_run_fills_slots_with_what_earlier_runs_used_most(offload_run, folder, monkeypatch):
    fill, known, filled = ExpertPool.fill, [], []

    def noted(pool, uses):
        fill(pool, uses)
        known.append({layer: [*own] for layer, own in uses.items()})
        filled.append([pool.held(layer)[::-1] for layer in range(4)])

    monkeypatch.setattr(ExpertPool, "fill", noted)
    run = ("generate", folder, "-p", "the dog", "-n", 9, "--ignore-eos", "--draft", "none")
    first, second = (offload_run(*run, "--expert-slots", 40) for _ in range(2))
    assert first.code == 0, first.err
    assert second.out == first.out
    lying = sorted(range(32), key=str)  # as files have them
    assert known[0] == {} and filled[0] == [lying[:10]] * 4
    assert sum(map(sum, known[1].values())) >= 8 * 4 * 2  # of tokens, and of the prompt
    for layer, own in known[1].items():
        used = sorted(lying, key=lambda expert, own=own: -own[expert])
        assert filled[1][layer] == used[:10] != lying[:10]


@pytest.mark.parametrize("hits", [0.0, 0.5])
def test_hits_compute_while_misses_come(hits):
    """A layer takes its router, then the longer of hits and the copy, then the misses."""
    layer = TimedLayer(kernel_s=1.0, missed_bytes=300, experts_s=0.8, missed_s=0.8 * (1 - hits))
    for rate in (100.0, 1000.0, inf):
        one = TimedPass(layers=[layer] * 3, slots=0, home_bytes_per_s=(rate,))
        beside = max(0.8 * hits, 300 / rate)
        assert steady_pass(one).pass_s == pytest.approx(3 * (0.2 + beside + 0.8 * (1 - hits)))


def test_misses_are_whole_and_each_number_of_them_waits_as_it_would():
    """A layer that lacks two half of the time waits, one that always lacks one might not."""

    def took(misses, rate=100.0, hits=0.75):
        layer = TimedLayer(
            kernel_s=1.2, missed_bytes=100, experts_s=1.0, missed_s=1 - hits, misses=misses
        )
        return steady_pass(TimedPass(layers=[layer] * 3, slots=0, home_bytes_per_s=(rate,))).pass_s

    for rate in (100.0, 200.0, 1e6):
        assert took((0.0, 1.0, 0.0, 0.0, 0.0), rate) == pytest.approx(took((), rate))
    # One takes a second of the link. Two are there 2 - 0.5 seconds after those that are held.
    assert took((0.5, 0.0, 0.5, 0.0, 0.0)) == pytest.approx(3 * (1.2 + 0.5 * (2.0 - 0.5)))
    assert took((0.5, 0.0, 0.5, 0.0, 0.0), 200.0) == pytest.approx(3 * (1.2 + 0.5 * (1.0 - 0.5)))
    assert took((), 200.0) == pytest.approx(3 * 1.2)
    assert took(chances_of(1.0, 4), 200.0) > 3 * 1.21
    for mean in (0.01, 1.0, 2.7, 4.0):
        chances = chances_of(mean, 4)
        assert sum(chances) == pytest.approx(1.0)
        assert sum(n * chance for n, chance in enumerate(chances)) == pytest.approx(mean)


def test_what_is_foreseen_crosses_while_nothing_else_does():
    """From one router to the next, right and wrong in turn; of the first layer nothing is known."""

    def took(foreseen, attention=1.5):
        layer = TimedLayer(
            kernel_s=attention + 0.5, missed_bytes=100, experts_s=0.5, foreseen_bytes=foreseen
        )
        return steady_pass(TimedPass(layers=[layer] * 3, slots=0, home_bytes_per_s=(100.0,))).pass_s

    assert took(0) == pytest.approx(3 * (1.5 + 1.0))
    assert took(60) == pytest.approx(1.5 + 1.0 + 2 * (1.5 + 0.5))  # 0.4 s are left, and hidden
    crossed = 100 * 0.25 / (1 + IN_VAIN)  # all of the time between
    assert took(60, 0.25) == pytest.approx(3 * 0.25 + 1.0 + 2 * (1 - crossed / 100), rel=0.02)


def test_what_reads_a_prompt_or_asks_for_nearly_all_foresees_nothing(folder):
    checkpoint = open_checkpoint(folder)
    counts = (32,) * 4
    pooled = PooledExperts(
        counts=counts, per_token=2, held=4.0, home_bytes=100, image_bytes=100, foreseen=0.5
    )
    model = PlacedModel(
        parts=parts_of(checkpoint, "bfloat16", CPU_SPEEDS.device),
        speeds=CPU_SPEEDS,
        residence=Residence(experts=pooled),
        context_tokens=64,
    )
    for load, share in (
        (model.load(1), 0.5),
        (model.load(87), 0.5),  # 1 - (1 - 2 / 32) ** 87**0.8 = 0.899 of a layer's experts
        (model.load(88), 0.0),  # 0.901
        (model.load(1, reads_prompt=True), 0.0),
    ):
        assert {layer.foreseen for layer in load.layers} == {share}
    for host_s, rows, prompt in product((1.0, 999.0), (8, 9), (True, False)):
        with_rates = replace(pooled, rates=MissRates(link_s=2.0, host_s=host_s))
        shared = replace(model, residence=Residence(experts=with_rates))
        layers = shared.load(rows, reads_prompt=prompt).layers  # up to 8 a host may compute some
        assert {layer.behind_bytes > 0 for layer in layers} == {rows == 8 and host_s < 2.0}
        assert {layer.foreseen > 0 for layer in layers} == {rows == 9 and not prompt}


def test_what_the_thread_of_offered_copies_reads_into_is_planned(folder):
    """Two buffers more, where weights do not land in place."""
    off, on = (
        plan(open_checkpoint(folder), "none", expert_slots=25, look_ahead=mode)
        for mode in (LookAhead.OFF, LookAhead.AUTO)
    )
    grown = on.placement.demand.workspace_bytes - off.placement.demand.workspace_bytes
    assert grown == 2 * STAGING_BYTES


def test_a_cpu_plans_nothing_for_experts_that_a_gpu_would_lack(folder):
    """It computes all of them, whatever `--exact` says."""
    checkpoint = open_checkpoint(folder)
    found = [
        plan(checkpoint, expert_slots=9, look_ahead=LookAhead.OFF, exact=Exact.OFF, **more)
        for more in ({}, {"expert_misses": ExpertMisses.LINK})
    ]
    assert len({each.placement.demand.workspace_bytes for each in found}) == 1


def test_a_processor_multiplies_no_faster_than_it_was_timed_to():
    """In as many threads as compute, and with the slowest of an expert's matrices."""
    memory, link = GPU.products_bytes_per_s(0.0, ()), 0.4 * GPU.products_bytes_per_s(0.0, ())
    assert GPU.products_bytes_per_s(link, ()) == pytest.approx(0.6 * memory)
    layers = load_profile(find_profile("cpu-2core-avx512")).layers
    timed = replace(GPU, profile=replace(GPU.profile, layers=layers))
    plain = timed.products_bytes_per_s(0.0, ())
    assert plain == pytest.approx(37.4e9, rel=0.01) and plain < memory
    assert timed.products_bytes_per_s(0.0, (), 1) <= plain / GPU.profile.machine.cores * 1.001
    extent = SimpleNamespace(nbytes=4096 * 2048)
    common = {"module": "m", "outputs": 4096, "inputs": 4096, "groups": 128}
    awq, eight = (
        Stored(form=form, bits=bits, parts={"qweight": extent}, **common)
        for form, bits in ((Form.AWQ, 4), (Form.GPTQ, 8))
    )
    each = [timed.products_bytes_per_s(0.0, (one,)) for one in (awq, eight)]
    assert timed.products_bytes_per_s(0.0, (awq, eight)) == min(each)
    assert all(extent.nbytes / rate > 2 * awq.numbers / plain for rate in each)


def test_a_token_of_a_prompt_adds_what_it_does_without_looking_ahead(folder):
    """Only the pass it is compared with, of one row, looks ahead: the difference is larger."""
    ahead, plain = (
        plan(open_checkpoint(folder), "none", disk=1e8, prompt=2, expert_slots=25, look_ahead=mode)
        for mode in (LookAhead.ON, LookAhead.OFF)
    )
    assert ahead.prediction.step_s < plain.prediction.step_s
    assert ahead.row_s > plain.row_s > 0


def test_few_rows_are_multiplied_with_mxfp4_as_it_is_stored(make_tiny, tmp_path):
    """On a GPU, where passes are not row-invariant; else experts are dequantised."""
    source = make_mixture(make_tiny, "gpt_oss", intermediate_size=64)
    checkpoint = open_checkpoint(write_gpt_oss(source, tmp_path).folder)
    for speeds, rows, exact, expected in (
        (GPU, 8, False, False),
        (GPU, 9, False, True),
        (GPU, 1, True, True),
        (CPU_SPEEDS, 1, False, True),
    ):
        model = PlacedModel(
            parts=parts_of(checkpoint, "bfloat16", speeds.device),
            speeds=speeds,
            residence=Residence(),
            context_tokens=64,
            exact=exact,
        )
        assert all(bool(la.experts_decoded) == expected for la in model.load(rows).layers)
    assert choosing_s(CUDA, 4, together=True) < choosing_s(CUDA, 4)


@pytest.mark.parametrize(("exact", "tiles"), [(False, 1), (True, 8)])
def test_launches_are_priced_by_the_experts_that_rows_are_sent_to(folder, exact, tiles):
    """Once a layer however many rows there are; where these go by tiles of 64, once for each."""
    pooled = PooledExperts(
        counts=(32,) * 4, per_token=2, held=8, home_bytes=1, image_bytes=1, host_s=5.0,
        launch_s=1.0,
    )  # fmt: skip
    model = PlacedModel(
        parts=parts_of(open_checkpoint(folder), "bfloat16", CUDA),
        speeds=GPU,
        residence=Residence(experts=pooled),
        context_tokens=64,
        exact=exact,
    )
    found = [model.load(rows).layers[0].choosing_s for rows in (1, 9, 64, 512)]
    used = [32 * (1 - (1 - 1 / 16) ** rows) for rows in (1, 9, 64, 64 if exact else 512)]
    expected = [5.0 + experts - 2.0 for experts in used]
    if not exact:
        expected[0] = 0.0  # in one launch
    assert found == pytest.approx([*expected[:-1], tiles * expected[-1]])


def test_few_rows_are_multiplied_with_plain_experts_in_one(folder):
    """As with MXFP4: on a GPU, where passes are not row-invariant."""
    pooled = PooledExperts(
        counts=(32,) * 4, per_token=2, held=8, home_bytes=1, image_bytes=1, host_s=5.0,
        together_s=2.0,
    )  # fmt: skip
    for rows, exact, expected in ((8, False, 2.0), (9, False, 5.0), (1, True, 5.0)):
        model = PlacedModel(
            parts=parts_of(open_checkpoint(folder), "bfloat16", CUDA),
            speeds=GPU,
            residence=Residence(experts=pooled),
            context_tokens=64,
            exact=exact,
        )
        assert {layer.choosing_s for layer in model.load(rows).layers} == {expected}
