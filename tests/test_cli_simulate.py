"""`simulate`: a machine one does not own, a scenario, the published table; and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
from test_outline import LLAMA_70B
from test_profile import PROJECT
from test_scenario import CHAIN, LAYER_70B, tree_of

from offload_rt.config import DraftConfig
from offload_rt.device.kinds import CUDA
from offload_rt.planning.memory import OTHER_BUFFERS
from offload_rt.planning.scenarios.scenario import (
    DrafterShape,
    ModelShape,
    PlacementShape,
    Scenario,
)
from offload_rt.profiling.store import find_profile, load_profile
from offload_rt.session import means
from offload_rt.speculative.ngram.kind import lookup_s
from offload_rt.units import parse_size

GPU = "rtx4090-pcie4x16"
PARTS = {
    "s_per_token",
    "s_per_pass",
    "tokens_per_pass",
    "bytes_per_pass",
    "transfer_s",
    "compute_s",
    "stall_s",
    "drafting_s",
    "limit",
}


@pytest.fixture
def big(tmp_path):
    """Llama-2-70B's configuration, and nothing else."""
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return folder


@pytest.fixture
def small(tmp_path):
    """A configuration of TinyLlama's size."""
    folder = tmp_path / "small"
    folder.mkdir()
    sizes = {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(LLAMA_70B | sizes | heads))
    return folder


@pytest.fixture
def answer(offload_run):
    def ask(*arguments):
        done = offload_run("simulate", *arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return ask


def scenario_file(folder, **changed):
    path = folder / "scenario.json"
    path.write_text(json.dumps(tree_of(profile=GPU, **changed)))
    return path


def test_seventy_billion_weights_on_a_gpu_nobody_has(answer, big):
    made = answer(big, "--profile", GPU, "--profile-set", "ram_bytes=256GiB")
    assert made.keys() >= PARTS and made["weights_read"] is False
    assert made["home"] == "host" and made["tokens_per_pass"] == 1
    layers = made["streamed_layers"] * LAYER_70B
    assert made["bytes_per_pass"] == pytest.approx(layers, rel=1e-4)  # norms besides
    assert made["s_per_token"] == pytest.approx(made["bytes_per_pass"] / 26e9, rel=0.01)
    slow = answer(
        big, "--profile", GPU, "--profile-set", "ram_bytes=256GiB", "--profile-set",
        "h2d_bytes_per_s=13e9",
    )  # fmt: skip
    assert slow["s_per_token"] == pytest.approx(2 * made["s_per_token"], rel=0.01)


def test_what_a_gpus_driver_and_allocator_take_is_told(answer, offload_run, small):
    """A row and a key each, of each GPU; a processor has neither."""
    one = answer(small, "--profile", GPU)
    assert one["context_bytes"] == CUDA.context_bytes
    assert one["slack_bytes"] == (22 + OTHER_BUFFERS) * (CUDA.buffer_bytes - 1)
    assert one["context_bytes"] + one["slack_bytes"] < one["workspace_bytes"]
    two = answer(small, "--profile", "2x-rtx4090-pcie4x16", "--device", "cuda:0,cuda:1")
    for key in ("context_bytes", "slack_bytes"):
        assert two[key] == 2 * one[key]
    none = answer(small, "--profile", "cpu-2core-avx512bf16")
    assert (none["context_bytes"], none["slack_bytes"]) == (0, 0)
    table = offload_run("simulate", small, "--profile", GPU).out
    rows = dict(re.findall(r"^  (\S.*?) {2,}([0-9.]+ [GM]iB)", table, re.MULTILINE))
    assert rows["driver's context"] == "512 MiB" and rows["allocator's slack"] == "76.0 MiB"
    parts = [parse_size(size.replace(" ", "")) for size in rows.values()]
    at = list(rows).index("device memory")
    assert sum(parts[:at]) == pytest.approx(parts[at], rel=0.01)
    table = offload_run("simulate", small, "--profile", "cpu-2core-avx512bf16").out
    assert "context" not in table and "slack" not in table and "workspace" in table


def test_it_is_quick_and_needs_no_torch(big):
    code = (
        "import sys, time; from offload_rt.cli import run;"
        f"code = run(['simulate', {str(big)!r}, '--profile', {GPU!r}]);"
        "assert 'torch' not in sys.modules; assert time.process_time() < 2; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 128 GiB of RAM do not hold 69 layers: some come from the disk, and that is said.
    assert "in host memory and the model's files" in done.stdout
    assert "config.json alone" in done.stdout


def test_the_same_numbers_as_a_scenario(answer, big, tmp_path):
    sets = ("--profile-set", "ram_bytes=256GiB")
    place = ("--resident-layers", 8, "--slots", 2, "--context", 1000)
    made = answer(big, "--profile", GPU, *sets, *place)
    written = scenario_file(
        tmp_path, context_tokens=1000, placement={"resident_layers": 8, "slots": 2}
    )
    other = answer("--scenario", written)
    for key in ("s_per_token", "transfer_s", "compute_s"):
        assert made[key] == pytest.approx(other[key], rel=0.002)


def test_a_draft_model_takes_memory_and_time_and_gives_tokens(answer, big, small):
    base = (big, "--profile", GPU, "--profile-set", "ram_bytes=256GiB")
    plain = answer(*base)
    chain = ("--draft-tokens", 8, "--draft-shape", "chain", "--acceptance", "0.9,0.8")
    made = answer(*base, "--draft", f"model:{small}", *chain)
    assert made["resident_layers"] < plain["resident_layers"]
    assert made["tokens_per_pass"] == pytest.approx(1 + 0.9 * sum(0.8**n for n in range(8)))
    # A recorded pass: 22 layers and the head read their bytes at the rate of the largest layer of
    # the profile, 60 kernels each, and what is in none; the text is attended to besides.
    layer_s, head_s = (nbytes * 2.122e-3 / 1_711_276_032 for nbytes in (88_080_384, 131_072_000))
    least = 8 * (22 * (layer_s + 60 * 1.5e-6) + head_s + 1e-4)
    assert least < made["drafting_s"] < 1.15 * least
    tree = ("--draft-tokens", 64, "--acceptance", "0.6/0.2/0.1")
    wide = answer(*base, "--draft", f"model:{small}", *tree)
    assert wide["tokens_per_pass"] > 1 + 0.6 + 0.3
    known = answer(*base, "--draft", f"model:{small}", "--tokens-per-pass", 9.9)
    assert known["tokens_per_pass"] == 9.9 and known["s_per_token"] < plain["s_per_token"]


def test_a_draft_model_needs_a_vocabulary_that_can_be_the_same(offload_run, big, small):
    tree = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(tree | {"vocab_size": 50000}))
    draft = ("--draft", f"model:{small}", "--tokens-per-pass", 4)
    done = offload_run("simulate", big, "--profile", GPU, *draft)
    assert done.code == 2 and "50000 tokens" in done.err and "the target 32000" in done.err


def test_ngrams_cost_nothing_and_triforce_its_own_passes(answer, big):
    base = (big, "--profile", GPU, "--profile-set", "ram_bytes=256GiB", "--context", 4096)
    free = answer(*base, "--draft", "ngram", "--acceptance", "0.5")
    assert free["drafting_s"] == lookup_s(DraftConfig(draft="ngram").nodes)
    assert free["tokens_per_pass"] > 1.9
    # Weights that are streamed are streamed for every draft pass: it cannot pay.
    dear = answer(*base, "--draft", "triforce", "--draft-tokens", 4, "--acceptance", "0.9")
    assert dear["drafting_s"] > 3 * dear["transfer_s"]
    inner = ("--inner-acceptance", "0.9")
    cheaper = answer(
        *base, "--draft", "triforce", "--draft-tokens", 4, "--acceptance", "0.9", *inner
    )
    assert cheaper["drafting_s"] < dear["drafting_s"]


def test_rounded_copies_stream_nothing_to_draft(answer, offload_run, small):
    base = (small, "--profile", GPU, "--context", 1024, "--resident-layers", 2)
    base = (*base, "--dtype", "bfloat16")
    draft = ("--draft", "triforce", "--draft-tokens", 4, "--acceptance", "0.9")
    own = answer(*base, *draft, "--retrieval-weights", "same")
    copies = answer(*base, *draft, "--retrieval-weights", "int4")
    assert answer(*base, *draft) == copies  # left open, it is the faster
    assert copies["drafting_s"] < own["drafting_s"] / 2
    assert copies["transfer_s"] == own["transfer_s"]
    assert copies["device_bytes"] > own["device_bytes"] + 2**29  # 1.1e9 weights in 4 bits
    done = offload_run("simulate", *base, *draft, "--retrieval-weights", "int8")
    assert done.code == 2 and "--retrieval-weights int8 is for the CPU" in done.err


def test_fewer_layers_are_resident_where_copies_draft_faster_so(answer, small):
    """Each draft pass reads a resident layer whole, a copy in a part of that time."""
    base = (small, "--profile", GPU, "--context", 1024, "--device-memory", "2200MiB")
    base = (*base, "--dtype", "bfloat16", "--draft", "self:int4", "--draft-tokens", 288)
    made, *fixed = (
        answer(*base, "--tokens-per-pass", 29.35, *more)
        for more in ((), *(("--resident-layers", count) for count in (0, 1, 4)))
    )
    assert made["tokens_per_s"] == max(each["tokens_per_s"] for each in fixed)
    assert made["tokens_per_s"] > 1.02 * fixed[2]["tokens_per_s"]  # as many as fit


def test_below_triforce_a_draft_model_sees_its_window_or_all(answer, offload_run, big, small):
    base = (big, "--profile", GPU, "--profile-set", "ram_bytes=256GiB", "--context", 4096)
    rates = ("--acceptance", "0.9", "--inner-acceptance", "0.5")
    draft = ("--draft", f"triforce:{small}", "--draft-tokens", 4)
    windowed = answer(*base, *draft, *rates)
    whole = answer(*base, *draft, *rates, "--draft-window", "full")
    assert whole["drafting_s"] > windowed["drafting_s"]
    done = offload_run("simulate", *base, *draft, "--acceptance", "0.9")
    assert done.code == 2 and "needs --inner-acceptance" in done.err


def test_offloaded_kv_is_streamed(answer, big):
    base = (big, "--profile", GPU, "--profile-set", "ram_bytes=512GiB", "--context", 4096)
    home = answer(*base, "--kv", "host", "--resident-layers", 4)
    near = answer(*base, "--kv", "device", "--resident-layers", 4)
    assert home["bytes_per_pass"] == near["bytes_per_pass"] + 80 * 4096 * 4096
    assert home["back_bytes_per_pass"] == 80 * 4096 and home["kv"] == "host"


def test_on_the_cpu_the_disk_is_the_link(answer, tiny_model):
    made = answer(tiny_model, "--profile", "cpu-2core-avx512bf16", "--resident-layers", 0)
    assert made["device"] == "cpu" and made["home"] == "disk" and made["weights_read"]
    assert made["transfer_s"] > 0


def test_the_same_numbers_as_a_plan(answer, offload_run, tiny_model, monkeypatch):
    name = "cpu-2core-avx512bf16"
    monkeypatch.setattr(means, "processor", lambda: ("as in the profile", "avx512_bf16"))
    place = ("--context", 64, "--resident-layers", 1, "--device-memory", "512MiB")
    made = answer(tiny_model, "--profile", name, *place)
    done = offload_run(
        "plan",
        tiny_model,
        "--device",
        "cpu",
        "--draft",
        "none",
        "--profile",
        name,
        *place,
        "--json",
    )
    planned = json.loads(done.out)["predicted"]
    assert made["compute_s"] == pytest.approx(planned["compute_s"])
    assert made["s_per_pass"] == pytest.approx(planned["pass_s"], abs=1.1e-3)  # and its bookkeeping


def test_what_stays_plain_here_is_priced_plain_as_in_a_plan(
    answer, offload_run, make_tiny, monkeypatch
):
    profile = load_profile(find_profile("cpu-2core-avx512bf16"))
    folder = make_tiny("llama", tokenizer=True, dtype="bfloat16")
    place = ("--context", 64, "--device", "cpu", "--exact", "off", "--profile", profile.name)
    plan = ("plan", folder, *place, "--draft", "none", "--json")
    monkeypatch.setattr(means, "processor", lambda: (profile.machine.cpu, "avx512_bf16"))
    found = []
    for left in ((), [(64, 128)]):
        monkeypatch.setattr(means, "left_plain", partial(frozenset, left))
        planned = json.loads(offload_run(*plan).out)["predicted"]
        found.append(answer(folder, *place)["compute_s"])
        assert found[-1] == pytest.approx(planned["compute_s"], rel=1e-6)
    assert found[0] < found[1]


def test_sequences_at_once_each_have_their_tokens(answer, offload_run, tiny_model):
    """In `simulate` and in `plan`, whose table says so."""
    place = ("--device", "cpu", "--draft", "none", "--context", 64, "--resident-layers", 1)
    plan = ("plan", tiny_model, *place)
    one, four = (
        json.loads(offload_run(*plan, "--sequences", count, "--json").out) for count in (1, 4)
    )
    assert (one["sequences"], four["sequences"]) == (1, 4)
    assert four["kv_bytes"] == 4 * one["kv_bytes"]
    assert "64 tokens of each of 4 sequences" in " ".join(
        offload_run(*plan, "--sequences", 4).out.split()
    )
    place = ("--profile", "cpu-2core-avx512bf16", "--context", 64, "--resident-layers", 1)
    one, four = (answer(tiny_model, *place, "--sequences", count) for count in (1, 4))
    assert (one["sequences"], four["sequences"]) == (1, 4)
    assert four["device_bytes"] > one["device_bytes"]
    assert four["compute_s"] > one["compute_s"]


def test_a_flag_counts_more_than_the_scenarios_own_change(answer, tmp_path):
    slow, fast = ["h2d_bytes_per_s=1e9"], "h2d_bytes_per_s=9e9"
    own = answer("--scenario", scenario_file(tmp_path, set=slow))
    asked = answer("--scenario", scenario_file(tmp_path, set=slow), "--profile-set", fast)
    assert asked["s_per_pass"] < own["s_per_pass"]


def test_tables_show_what_the_object_has(offload_run, big, small, tmp_path):
    done = offload_run(
        "simulate", big, "--profile", GPU, "--draft", f"model:{small}", "--tokens-per-pass", 4
    )
    for text in ("resident layers", "tokens per pass", "transfer", "drafting", "limited by"):
        assert text in done.out
    done = offload_run("simulate", "--scenario", scenario_file(tmp_path, draft=CHAIN))
    assert done.code == 0 and "3.36 tokens per pass" in done.out
    assert "rests on assumed numbers" in done.out


def test_published_runs_are_shown_with_their_misses(offload_run, answer):
    rows = answer("--validate")
    done = offload_run("simulate", "--validate")
    lines = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert done.code == 0 and len(lines) == len(rows) + 2
    missed = [row["scenario"] for row in rows if not row["hit"]]
    for row in rows:
        line = next(x for x in done.out.splitlines() if x.startswith(row["scenario"] + " "))
        assert ("MISS" in line) == (row["scenario"] in missed)
    assert f"{len(rows) - len(missed)} of {len(rows)} within 15%" in done.out


def test_every_key_of_a_scenario_is_explained(offload_run):
    done = offload_run("simulate", "--scenario-help")
    assert done.code == 0
    for record in (Scenario, ModelShape, PlacementShape, DrafterShape):
        for name in record.__dataclass_fields__:
            assert f"  {name} (" in done.out
    assert "2.0 if left out" in done.out and "one of none, chain, tree, triforce" in done.out


BAD = [
    ((), "simulate needs one of MODEL, --scenario, --validate, --scenario-help"),
    (("x", "--validate"), "simulate needs one of"),
    (("--validate", "--context", "9"), "--context has no effect with --validate"),
    (("--scenario", "S", "--draft", "ngram"), "--draft has no effect with --scenario"),
    (("--scenario-help", "--profile", "x"), "--profile has no effect with --scenario-help"),
    (("--scenario", "none.json"), "scenario none.json cannot be read"),
    (("B", "--profile", "nothing"), "there is no profile 'nothing'"),
    (("B", "--profile", "G", "--profile-set", "speed=3"), "'speed' is no number of a profile"),
    (("B", "--profile", "G", "--profile-set", "h2d_bytes_per_s=-3"), "give a number above 0"),
    (("B", "--profile", "G", "--device", "cuda:1"), "--device cuda:1 is not known"),
    (("B", "--profile", "cpu-2core-avx512bf16", "--device", "cuda"), "has no GPU"),
    (("B", "--profile", "G", "--draft", "ngram"), "needs one of --acceptance and --tokens-per"),
    (("B", "--profile", "G", "--acceptance", "0.5"), "have no effect without --draft"),
    (("B", "--profile", "G", "--draft", "ngram", "--acceptance", "much"), "write a rate for each"),
    (("B", "--profile", "G", "--draft", "ngram", "--acceptance", "1.5"), "rates are from 0 to 1"),
    (("B", "--profile", "G", "--draft", "ngram", "--acceptance", "nan"), "rates are from 0 to 1"),
    (("B", "--profile", "G", "--draft", "triforce", "--acceptance", ".5/.2"), "drafts chains"),
    (
        ("B", "--profile", "G", "--draft", "ngram", "--acceptance", ".5", "--tokens-per-pass", "2"),
        "both are given",
    ),
    (
        (
            "B",
            "--profile",
            "G",
            "--draft",
            "ngram",
            "--acceptance",
            ".5",
            "--inner-acceptance",
            ".5",
        ),
        "--inner-acceptance is for --draft triforce",
    ),
    (("B", "--profile", "G", "--resident-layers", "99"), "the model has 80 layers"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_wrong_command_lines_are_one_sentence(offload_run, big, tmp_path, arguments, says):
    names = {"B": big, "G": GPU, "S": scenario_file(tmp_path)}
    done = offload_run("simulate", *(names.get(a, a) for a in arguments))
    assert done.code == 2 and says in done.err and done.out == ""
    assert done.err.count("\n") == 1 and "Traceback" not in done.err


def test_what_a_run_would_refuse_is_refused(offload_run, tiny_model):
    for more, says in [
        (("--context", 64, "--look-ahead", "on"), "--look-ahead on has no effect on"),
        (("--context", 10**6), "was made for up to"),
    ]:
        for verb in ("plan", "simulate"):
            done = offload_run(verb, tiny_model, "--device", "cpu", *more)
            assert done.code == 2 and says in done.err, (verb, done.err)


def test_what_fits_nowhere_and_broken_files_have_their_codes(offload_run, big, tmp_path):
    done = offload_run("simulate", big, "--profile", GPU, "--device-memory", "1GiB")
    assert done.code == 3 and "needs" in done.err
    (big / "config.json").write_text("{")
    done = offload_run("simulate", big, "--profile", GPU)
    assert done.code == 4 and done.err.count("\n") == 1
    path = scenario_file(tmp_path, placement={"devices": 2})
    done = offload_run("simulate", "--scenario", path)
    assert done.code == 2 and "has 1 GPUs" in done.err
    path.write_text(json.dumps(tree_of(profile=GPU, placement={"resident_layers": 81})))
    done = offload_run("simulate", "--scenario", path)
    assert done.code == 2 and "placement.resident_layers is 81" in done.err
    assert done.err.count("\n") == 1


def test_a_hostile_profile_is_refused(offload_run, big, tmp_path):
    path = tmp_path / "p.json"
    text = (PROJECT / "profiles" / f"{GPU}.json").read_text()
    for old, new in [
        ('"value": 26000000000.0', '"value": -1'),
        ('"value": 26000000000.0', '"value": NaN'),
        ('"schema_version": 1', '"schema_version": 9'),
        ('"cores": 16', '"cores": 1e99'),
    ]:
        path.write_text(text.replace(old, new))
        done = offload_run("simulate", big, "--profile", path)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
    shutil.rmtree(big)
    done = offload_run("simulate", big, "--profile", GPU)
    assert done.code == 4 and "does not exist" in done.err


def test_without_a_profile_of_its_own_it_takes_the_stand_in_of_plan(tiny_model, offload_run):
    """And says so in the same words."""
    place = ("--device", "cpu", "--context", 64)
    planned = json.loads(offload_run("plan", tiny_model, *place, "--draft", "none", "--json").out)
    simulated = json.loads(offload_run("simulate", tiny_model, *place, "--json").out)
    assert simulated["own_profile"] is planned["own_profile"] is False
    assert simulated["profile"] == planned["profile"]
    assert simulated.items() >= planned["predicted"].items()
    assert simulated["bytes_per_pass"] == planned["bytes_per_pass"]
    words = f"{planned['profile']}; measure this machine with `offload-run profile`"
    for verb in ("simulate", "plan"):
        assert words in " ".join(offload_run(verb, tiny_model, *place).out.split())


def test_help_says_that_nothing_drafts(offload_run):
    text = " ".join(offload_run("simulate", "--help-all").out.split())
    about = text.partition(" --draft ")[2].partition(" --draft-tokens ")[0]
    assert "[default: none]" in about and "ngram" in about and "auto" not in about


def test_a_stand_in_for_a_gpu_that_is_asked_for(tiny_model, offload_run):
    done = offload_run("simulate", tiny_model, "--device", "cuda", "--context", 64, "--json")
    assert json.loads(done.out)["profile"] == "rtx4090-pcie4x16"
