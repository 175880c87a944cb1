"""Plans as files, what drafting gave, and `auto` from the command line."""

import json
import re

import pytest

from offload_rt.planning.history import add_seen, read_seen
from offload_rt.planning.yields import NOTHING_SEEN, Outcome, Seen, Tally
from offload_rt.session import means
from offload_rt.session.means import experience_path

PROMPT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def planned(deep_model, offload_run, tmp_path):
    """A plan of two resident layers, three slots and drafts of five tokens, as a file."""
    path = tmp_path / "plan.json"
    made = offload_run(
        *("plan", deep_model, "--context", 64, "--device-memory", "100MiB"),
        *("--resident-layers", 1, "--slots", 3, "--draft", "ngram", "--draft-tokens", 5),
        *("--output", path),
    )
    assert (made.code, made.err) == (0, "")
    return path


def edited(path, **changes):
    record = json.loads(path.read_text())
    for key, value in changes.items():
        place = record["options"] if key in record["options"] else record
        place[key] = value
    path.write_text(json.dumps(record))
    return path


def test_a_plan_is_replayed(planned, deep_model, offload_run):
    record = json.loads(planned.read_text())
    done = offload_run("generate", deep_model, "-p", PROMPT, "-n", 8, "--plan", planned, "--json")
    plan = json.loads(done.out)["plan"]
    assert plan["resident"] == record["resident"] == [2]
    assert (plan["slots"], plan["drafter"], plan["draft_tokens"]) == (3, "ngram", 5)
    assert json.loads(done.out)["memory"]["device_limit_bytes"] == 100 * 2**20
    again = json.loads(offload_run("plan", deep_model, "--plan", planned, "--json").out)
    assert (again["resident"], again["slots"], again["draft_tokens"]) == ([2], 3, 5)


def test_a_plan_fixes_what_a_run_would_begin_with(deep_model, offload_run, tmp_path):
    path = tmp_path / "plan.json"
    common = (deep_model, "--draft", "ngram", "--device-memory", "100MiB")
    made = json.loads(offload_run("plan", *common, "--context", 64, "--json", "--output", path).out)
    assert made["draft_tokens"] > made["first_draft_tokens"] > 0
    shown = offload_run("plan", *common, "--context", 64).out
    first, most = made["first_draft_tokens"], made["draft_tokens"]
    assert f"ngram, {first} tokens at first, up to {most} a pass" in shown
    assert json.loads(path.read_text())["options"]["draft_tokens"] == first
    run = ("generate", deep_model, "-p", PROMPT, "-n", 56, "--json")
    open_run = json.loads(offload_run(*run, *common[1:]).out)["plan"]
    assert open_run["draft_tokens"] > open_run["first_draft_tokens"]
    fixed = json.loads(offload_run(*run, "--plan", path).out)["plan"]
    assert fixed["draft_tokens"] == fixed["first_draft_tokens"] == first


def test_an_edited_plan_is_followed(planned, deep_model, offload_run):
    edited(planned, resident=[0, 3], slots=2, draft="none", draft_tokens=None)
    done = offload_run("generate", deep_model, "-p", PROMPT, "-n", 4, "--plan", planned, "--json")
    plan = json.loads(done.out)["plan"]
    assert (plan["resident"], plan["slots"], plan["drafter"]) == ([0, 3], 2, "none")


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"resident": [0, 9]}, 2, "layer 9 on the device, the model has layers 0 to 3"),
        ({"resident": [-1]}, 2, "resident must be a list of layers"),
        ({"resident": "all"}, 2, "resident must be a list of layers"),
        ({"device": "tpu"}, 2, "--device tpu is not known"),
        ({"device_limit_bytes": 2**20}, 3, "use --device-memory"),
        ({"device_limit_bytes": "2GiB"}, 2, 'options.device_limit_bytes cannot be "2GiB"'),
        ({"slots": 0}, 2, "--slots is 0"),
        ({"kv_folder": "a\0"}, 2, 'kv_folder is "a\\u0000", with a zero byte'),
        ({"slots": True}, 2, "options.slots cannot be true"),
        ({"dtype": "int3"}, 2, 'options.dtype is "int3"; known are auto, bfloat16'),
        ({"kv": "none"}, 2, 'options.kv is "none"; known are auto, device, host, disk'),
        ({"home": ""}, 2, 'options.home is ""'),
        ({"options": {"shape": "bush"}}, 2, 'options.shape is "bush"'),
        ({"options": {"draft_weights": "int5"}}, 2, "known are auto, same, int8, int4"),
        ({"draft": "magic"}, 2, "--draft magic is not known"),
        ({"layers": 5}, 2, "of 5 layers"),
        ({"schema_version": 9}, 2, "schema_version is 9"),
        ({"colour": "red"}, 2, "'colour'"),
        ({"options": {"speed": 1}}, 2, "options has 'speed'"),
        ({"options": []}, 2, "options must be an object"),
        ({"model": 3}, 2, "model must be a name"),
    ],
)
def test_plans_that_cannot_be(changes, code, message, planned, deep_model, offload_run):
    edited(planned, **changes)
    for verb in (["generate", deep_model, "-p", "x", "-n", 4], ["plan", deep_model]):
        done = offload_run(*verb, "--plan", planned)
        assert (done.code, done.out) == (code, ""), done.err
        assert re.fullmatch(rf"offload-run: error: [^\n]*{re.escape(message)}[^\n]*\n", done.err)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10**5, "\xff", " " * (2**20 + 1)])
def test_files_that_are_no_plans(text, deep_model, offload_run, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    done = offload_run("plan", deep_model, "--plan", path)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"offload-run: error: --plan .* is not a usable plan: .*\n", done.err)
    gone = offload_run("plan", deep_model, "--plan", tmp_path / "gone.json")
    assert gone.code == 2 and "no such file" in gone.err
    nowhere = offload_run("plan", deep_model, "--output", tmp_path / "no" / "plan.json")
    assert nowhere.code == 2 and "is no folder: make it first" in nowhere.err


@pytest.mark.parametrize(
    "flags", [["--slots", 2], ["--draft", "none"], ["--resident-layers", 1], ["--kv", "disk"]]
)
def test_a_flag_that_contradicts_the_plan(flags, planned, deep_model, offload_run):
    done = offload_run("generate", deep_model, "-p", "x", "--plan", planned, *flags)
    assert done.code == 2 and flags[0] in done.err and "leave out one" in done.err
    same = offload_run("generate", deep_model, "-p", "x", "-n", 2, "--plan", planned, "--slots", 3)
    assert same.code == 0


def test_the_plan_says_how_fast_and_why(deep_model, offload_run):
    table = offload_run("plan", deep_model, "--context", 64).out
    for wanted in ("predicted (profile ", "s/token", "bound by", "other ways", "ngram"):
        assert wanted in table
    record = json.loads(offload_run("plan", deep_model, "--context", 64, "--json").out)
    assert record["predicted"]["s_per_token"] > 0
    drafters = {way["draft"] for way in record["considered"]}
    assert drafters == {"none", "ngram"}


@pytest.mark.parametrize(
    ("flag", "name"), [("avx512_bf16", "cpu-2core-avx512bf16"), ("", "cpu-2core-avx512")]
)
def test_the_shipped_profile_that_stands_in_is_of_a_like_cpu(
    deep_model, offload_run, monkeypatch, flag, name
):
    """Without instructions for bf16 more rows cost much more, and nothing is reordered."""
    monkeypatch.setattr(means, "machine_name", lambda: "a-machine-without-a-profile")
    monkeypatch.setattr(means, "processor", lambda: ("a CPU", flag))
    done = offload_run("plan", deep_model, "--context", 64, "--device", "cpu", "--json")
    assert json.loads(done.out)["profile"] == name


def test_a_profile_can_be_named(deep_model, offload_run):
    base = ("plan", deep_model, "--context", 64, "--json")
    record = json.loads(offload_run(*base, "--profile", "cpu-2core-avx512bf16").out)
    assert record["profile"] == "cpu-2core-avx512bf16"
    gpu = ("--device", "cuda", "--device-memory", "8GiB", "--profile", "rtx3090-pcie4x16")
    record = json.loads(offload_run(*base, *gpu).out)
    assert (record["profile"], record["device"]) == ("rtx3090-pcie4x16", "cuda")
    lacking = offload_run(*base, "--profile", "rtx3090-pcie4x16")
    assert lacking.code != 0 and "has no " in lacking.err
    gone = offload_run(*base, "--profile", "nobodys")
    assert gone.code != 0 and "no profile 'nobodys'" in gone.err


def test_auto_writes_what_none_writes(deep_model, offload_run):
    base = ("generate", deep_model, "-p", PROMPT * 3, "-n", 24, "-q")
    plain = offload_run(*base, "--draft", "none").out
    assert offload_run(*base).out == plain
    assert offload_run(*base, "--draft", f"model:{deep_model}").out == plain


def test_a_seed_brings_the_same_answer_whatever_was_learned(deep_model, offload_run):
    base = ("generate", deep_model, "-p", PROMPT, "-n", 12, "--temperature", 1, "--seed", 7)
    first = json.loads(offload_run(*base, "--json").out)
    assert first["exact"] == {"rows": 16, "key_block": 64, "prompt": True, "why": None}
    plain = json.loads(offload_run(*base, "--exact", "off", "--json").out)
    assert plain["speculation"]["drafter"] == "none"
    offload_run("generate", deep_model, "-p", PROMPT * 4, "-n", 20, "-q", "--temperature", 1)
    assert offload_run(*base, "-q").out == first["text"] + "\n"
    drafted = [*base, "--draft", f"model:{deep_model}", "--json"]
    one, two = (json.loads(offload_run(*drafted).out) for _ in range(2))
    assert one["token_ids"] == two["token_ids"]
    assert one["plan"]["draft_tokens"] == 64


def test_what_drafting_gave_is_kept_and_read_again(deep_model, offload_run):
    draft = ("--draft", f"model:{deep_model}")
    offload_run("generate", deep_model, "-p", PROMPT, "-n", 60, *draft, "--draft-tokens", 4)
    kept = json.loads(experience_path().read_text())["entries"]
    (key,) = kept
    assert "model" in key and "greedy" in key
    assert all(value == int(size) for size, (_, value) in kept[key]["accepted"].items())
    again = json.loads(offload_run("plan", deep_model, "--json", *draft).out)
    one = next(way for way in again["considered"] if way["draft_tokens"] == 1)
    assert one["predicted"]["tokens_per_pass"] > 1.8  # 1.75 if nothing had been learned


def test_what_auto_chose_beside_a_model_is_read_again(deep_model, offload_run):
    """A run that chose another drafter than the model keeps what that gave under its own name."""
    base = ("-p", PROMPT * 3, "-n", 40, "--draft", "ngram", "--draft-tokens", 4)
    offload_run("generate", deep_model, *base)
    (key,) = json.loads(experience_path().read_text())["entries"]
    add_seen(experience_path(), key, Seen(accepted={1: (500.0, 0.0)}, hits=(500.0, 1.0)))
    gives = {}
    for draft in ("auto", f"auto:{deep_model}"):
        made = json.loads(offload_run("plan", deep_model, "--json", "--draft", draft).out)
        ways = [way for way in made["considered"] if way["draft"] == "ngram"]
        gives[draft] = [way["predicted"]["tokens_per_pass"] for way in ways]
    first, second = gives.values()
    assert first == second
    assert first[0] < 1.05  # not what is expected of it at first


def test_that_nothing_was_found_is_kept_too(tmp_path):
    path = tmp_path / "drafting.json"
    add_seen(path, "k", Seen(accepted={4: (2.0, 1.5)}, hits=(10.0, 1.0)))
    add_seen(path, "k", Seen(accepted={}, hits=(30.0, 0.0)))
    assert read_seen(path, "k").hits == (40.0, 0.25)
    old = json.loads(path.read_text())
    del old["entries"]["k"]["made"]  # as files of before are
    path.write_text(json.dumps(old))
    assert read_seen(path, "k").hits == (40.0, 0.25)


def test_a_plan_keeps_blocks_and_folder_of_kv(deep_model, offload_run, tmp_path):
    kv = ("--kv", "disk", "--kv-block-tokens", 64, "--kv-folder", tmp_path)
    plan = tmp_path / "plan.json"
    assert offload_run("plan", deep_model, "--context", 90, *kv, "--output", plan).code == 0
    kept = json.loads(plan.read_text())["options"]
    assert (kept["kv_block_tokens"], kept["kv_folder"]) == (64, str(tmp_path))
    done = offload_run("generate", deep_model, "-p", "x", "-n", 2, "--plan", plan)
    assert done.code == 0, done.err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "entries": {"k": 3}}', "[" * 9999])
def test_a_damaged_memory_is_like_none(text, tmp_path):
    path = tmp_path / "drafting.json"
    path.write_text(text)
    assert read_seen(path, "k") == NOTHING_SEEN
    add_seen(path, "k", Seen(accepted={4: (2.0, 1.5)}, hits=(2.0, 1.0)))
    assert read_seen(path, "k").accepted == {4: (2.0, 1.5)}


def test_counts_add_up_and_old_ones_fade(tmp_path):
    path = tmp_path / "sub" / "drafting.json"
    add_seen(path, "k", Seen(accepted={4: (10.0, 1.0)}, hits=(10.0, 0.0)))
    add_seen(path, "k", Seen(accepted={4: (30.0, 3.0), 8: (1.0, 2.0)}, hits=(30.0, 1.0)))
    seen = read_seen(path, "k")
    assert seen.accepted[4] == pytest.approx((40.0, 2.5)) and seen.accepted[8] == (1.0, 2.0)
    assert seen.hits == pytest.approx((40.0, 0.75))
    assert seen.made == (0.0, 0.0)
    add_seen(path, "k", Seen(accepted={8: (1.0, 2.0)}, made=(4.0, 0.5)))
    add_seen(path, "k", Seen(accepted={8: (1.0, 2.0)}, made=(4.0, 1.0)))
    assert read_seen(path, "k").made == (8.0, 0.75)
    add_seen(path, "k", Seen(accepted={4: (5000.0, 0.0)}, hits=(5000.0, 0.0)))
    add_seen(path, "k", Seen(accepted={4: (500.0, 2.0)}, hits=(500.0, 1.0)))
    assert read_seen(path, "k").accepted[4][1] > 1.9
    assert read_seen(path, "another") == NOTHING_SEEN


def test_a_memory_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    add_seen(tmp_path / "file" / "x.json", "k", Seen(accepted={4: (1.0, 1.0)}, hits=(1.0, 1.0)))


def test_a_tally_counts_beginnings_of_nested_drafts():
    tally = Tally()
    tally.add(8, Outcome(drafted=8, path=[0, 1, 2], nested=True))
    assert tally.seen().made == (0.0, 0.0)
    tally.add(8, Outcome(drafted=0, path=[], nested=True))
    tally.add(8, Outcome(drafted=8, path=[0, 5], nested=False, made=0.5))
    seen = tally.seen()
    assert seen.made == (1, 0.5)
    assert seen.hits == (3, 2 / 3)
    assert seen.accepted == {1: (1, 1.0), 2: (1, 2.0), 4: (1, 3.0), 8: (2, 2.5)}
