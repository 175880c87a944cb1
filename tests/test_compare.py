"""The comparison with fake engines: order, rows, failures, resuming, what its summary says."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from waits import wait_until

from offload_rt.baselines import pagecache
from offload_rt.baselines.cap import DataLimit, GroupCap, ScopeCap, find_cap
from offload_rt.baselines.comparison import Comparison, Conditions, _environment
from offload_rt.baselines.engines import DRAFTED, KNOWN, OURS, EngineSpec
from offload_rt.baselines.process import Worker, WorkerFailedError
from offload_rt.baselines.rows import (
    Answered,
    MachineRow,
    PromptRow,
    Run,
    Setup,
    begin,
    read,
    same_tokens,
)
from offload_rt.baselines.summary import differences, summaries
from offload_rt.baselines.workers.zero_settings import spend, zero_config
from offload_rt.device import system
from offload_rt.errors import ConfigError

FAKE = Path(__file__).with_name("fake_worker.py")
PACKAGE = Path(__file__).parent.parent / "offload_rt"
PROMPTS = [[5, 6, 7], [9, 9], [4, 1, 1, 2]]
MIB = 2**20


def fake(name, behaviour="good", **more):
    arguments = ("-S", str(FAKE), behaviour)  # packages of the environment: 40 of its 50 ms
    return EngineSpec(name=name, arguments=arguments, environment="", module="json", **more)


def setup_of(engines, batches=(1,), **changes):
    values = {
        "model": "m",
        "files": [["model.safetensors", 8]],
        "dtype": "bfloat16",
        "device": "cpu",
        "device_bytes": 2**30,
        "cap_bytes": None,
        "cap": "none",
        "page_cache": "dropped",
        "prompt_file": "set.jsonl",
        "prompts": [
            PromptRow(name=f"p{i}", category="c", tokens=len(ids), digest=str(i))
            for i, ids in enumerate(PROMPTS)
        ],
        "max_tokens": 5,
        "ends": False,
        "draft": "",
        "batches": list(batches),
        "engines": [spec.name for spec in engines],
        "machine": MachineRow(cpu="c", cores=2, ram_bytes=2**34, gpus=[]),
        "weights_bytes": 2**32,
        "command": "offload-run compare",
    }
    return Setup(**(values | changes))


def comparison(folder, engines, batches=(1,), timeout_s=20.0, said=None):
    weights = folder / "weights.bin"
    weights.write_bytes(b"x")
    conditions = Conditions(
        model=folder,
        files=[weights],
        prompts=PROMPTS,
        max_tokens=5,
        end_tokens=[],
        load={"dtype": "bfloat16", "device": "cpu"},
        kv_bytes_per_token=8,
        runtime={},
        draft={},
        no_draft={},
        draft_model=None,
        decode=lambda ids: " ".join(map(str, ids)),
        timeout_s=timeout_s,
    )
    return Comparison(
        conditions=conditions,
        raw=begin(folder / "raw.jsonl", setup_of(engines, batches)),
        engines=engines,
        pythons={spec.name: Path(sys.executable) for spec in engines},
        cap=find_cap(None),
        folder=folder,
        say=(said if said is not None else []).append,
    )


def test_rounds_are_interleaved_and_every_engine_gets_every_prompt(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "mine").touch()
    one = comparison(tmp_path, [fake(OURS), fake("b", "slow"), fake("c")], batches=(1, 2))
    one.run(2)
    assert (tmp_path / "scratch" / "mine").exists()  # a folder of the user's
    rows = one.raw.answers()
    order = list(dict.fromkeys((r.run.round, r.run.batch, r.run.engine) for r in rows))
    engines = (OURS, "b", "c")
    assert order == [(n, batch, e) for n in range(2) for batch in (1, 2) for e in engines]
    for run in dict.fromkeys(row.run for row in rows):
        mine = [row.prompts for row in rows if row.run == run]
        assert mine == ([[0], [1], [2]] if run.batch == 1 else [[0, 1], [2, 0]])
    loads = [row.run for row in one.raw.loads()]
    assert loads == list(dict.fromkeys(row.run for row in rows))
    assert not (tmp_path / ".offload-run-scratch").exists()


def test_the_summary_is_the_median_over_prompts_then_rounds(tmp_path):
    one = comparison(tmp_path, [fake(OURS), fake("b", "slow")], batches=(1, 2))
    one.run(3)
    found = {(s.engine, s.batch): s for s in summaries(one.raw)}
    assert found[OURS, 1].s_per_token.median == 0.5
    assert found["b", 1].tokens_per_s.median == 1.0
    assert found["b", 2].tokens_per_s.median == 2.0  # two sequences at once
    assert found["b", 2].s_per_token.median == 1.0
    assert found["b", 1].faster.median == 2.0 and found[OURS, 1].faster is None
    assert found["b", 1].read_bytes_per_token.median == 1e9
    assert found["b", 1].read_bytes_per_s.median == 1e9
    assert (found["b", 1].rounds, found["b", 1].answers) == (3, 9)
    assert (found["b", 2].same, found["b", 2].compared) == (4, 4)
    assert found["b", 2].tokens_per_pass.median == 1.0  # of each of the two


def answered(engine, number, group, s_per_token):
    return Answered(
        run=Run(round=number, engine=engine, batch=1),
        group=group,
        prompts=[group],
        token_ids=[[1, 2, 3]],
        texts=["x"],
        ttft_s=1.0,
        decode_s=2 * s_per_token,
        first_tokens=1,
        passes=3,
        prompt_read_bytes=0,
        decode_read_bytes=0,
        decode_link_bytes=None,
        host_peak_bytes=1,
        device_peak_bytes=1,
    )


def test_ratios_are_paired_within_a_round(tmp_path):
    """A machine twice as slow in one round must not change them."""
    raw = begin(tmp_path / "raw.jsonl", setup_of([fake(OURS), fake("b")]))
    for number, slow in enumerate((1.0, 2.0, 7.0)):
        for engine, time_s in ((OURS, 0.5), ("b", 1.5)):
            for group, prompt in enumerate((1.0, 3.0)):
                raw.append(answered(engine, number, group, slow * time_s * prompt))
    ours, theirs = summaries(raw)
    assert (theirs.faster.low, theirs.faster.median, theirs.faster.high) == (3.0, 3.0, 3.0)
    assert (ours.s_per_token.low, ours.s_per_token.median, ours.s_per_token.high) == (1, 2, 7)


@pytest.mark.parametrize(
    ("behaviour", "stage", "reason"),
    [
        ("crash", "warm-up", "ended with exit code 1: ValueError: no such layer"),
        ("crash@load", "load", "ended with exit code 1: ValueError: no such layer"),
        ("garbage", "warm-up", "it printed what is no reply: Loading checkpoint shards"),
        ("error@load", "load", "OutOfMemoryError: needs 2 GiB"),
        ("nan@load", "load", "'load_s' is nan, which cannot be"),
        ("closed", "warm-up", "it closed its output without an answer"),
        ("hang", "warm-up", "it gave no answer within 2 s and was ended"),
    ],
)
def test_an_engine_that_fails_is_a_row_and_the_others_go_on(
    behaviour, stage, reason, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    monkeypatch.setattr("offload_rt.baselines.process._END_S", 0.3)
    one = comparison(tmp_path, [fake(OURS), fake("bad", behaviour), fake("c")], timeout_s=2.0)
    one.run(2)
    (failed,) = one.raw.failures()  # not tried again in the second round
    assert (failed.run, failed.stage) == (Run(round=0, engine="bad", batch=1), stage)
    assert failed.reason.startswith(reason)
    assert {s.engine: s.answers for s in summaries(one.raw)} == {OURS: 6, "c": 6}
    if behaviour == "hang":
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == 2
        wait_until(lambda: not any(alive(pid) for pid in pids))


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_an_engine_without_an_environment_and_a_batch_too_large_are_rows(tmp_path):
    one = comparison(tmp_path, [fake(OURS), fake("b"), fake("c", largest_batch=1)], batches=(2,))
    one.pythons = one.pythons | {"b": "b is not installed: run setup"}
    one.run(1)
    reasons = {row.run.engine: (row.stage, row.reason) for row in one.raw.failures()}
    assert reasons == {
        "b": ("start", "b is not installed: run setup"),
        "c": ("start", "it answers 1 sequence at once"),
    }


def test_a_text_that_differs_is_shown_with_the_gap(tmp_path):
    one = comparison(tmp_path, [fake(OURS), fake("b", "other")])
    one.run(2)
    found = differences(one.raw)
    assert [(d.prompt, d.index) for d in found] == [(0, 2), (1, 2), (2, 2)]
    assert found[0].texts == ("21 22 23 24 25", "21 22 24 25 26")
    assert (found[0].gap.tokens, found[0].gap.logits) == ([23, 24], [16.0, 15.875])
    (theirs,) = (s for s in summaries(one.raw) if s.engine == "b")
    assert (theirs.same, theirs.compared) == (0, 3)
    gaps = len(one.raw.gaps())
    again = comparison(tmp_path, [fake(OURS), fake("b", "other")])
    again.run(2)  # nothing is missing, so nothing runs
    assert len(again.raw.gaps()) == gaps == 3
    assert len(read(tmp_path / "raw.jsonl").rows) == len(one.raw.rows)


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_compare
from offload_rt.baselines.engines import OURS
engines = [test_compare.fake(OURS), test_compare.fake("b", "slow")]
test_compare.comparison(Path(sys.argv[1]), engines).run(3)
"""


def test_a_comparison_that_is_killed_goes_on_from_its_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.05")
    raw = tmp_path / "raw.jsonl"
    process = Forked([sys.executable, "-c", KILLED, tmp_path, Path(__file__).parent])
    wait_until(lambda: raw.exists() and raw.read_bytes().count(b"answered") >= 7, limit_s=30.0)
    process.kill()
    process.wait()
    before = read(raw).rows
    with raw.open("ab") as file:
        file.write(b'{"kind": "answered", "run"')  # a line that was being written
    assert read(raw).torn_bytes == 26
    one = comparison(tmp_path, [fake(OURS), fake("b", "slow")])
    one.run(3)
    rows = read(raw).rows
    assert rows[: len(before)] == before and read(raw).torn_bytes == 0
    keys = [(r.run, r.group) for r in rows if isinstance(r, Answered)]
    assert len(keys) == len(set(keys)) == 2 * 3 * 3


def test_more_rounds_may_be_added_but_other_conditions_not(tmp_path):
    path = tmp_path / "raw.jsonl"
    engines = [fake(OURS)]
    begin(path, setup_of(engines))
    begin(path, setup_of(engines, command="offload-run compare --rounds 9"))
    with pytest.raises(ConfigError, match=r"another comparison \(its max tokens is 5, now 6\)"):
        begin(path, setup_of(engines, max_tokens=6))
    with pytest.raises(ConfigError, match=r"its engines are others"):
        begin(path, setup_of([fake("b")]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON"),
        (b"[1]", "line 2 is no row of a comparison: its kind is None"),
        (b'{"kind": "setup"}', "line 2 is no row"),
        (b'{"kind": ["x"]}', "line 2 is no row"),
        (b'{"kind": "failed", "run": 3, "stage": "x", "reason": "y"}', "Run is not an object"),
        (b'{"kind": "failed", "stage": "x", "reason": "y"}', "the key 'run' is missing"),
        (b'{"kind": "gap", "x": 1}', "the key 'x' is not known"),
        (b"\xff", "line 2 is not JSON"),
    ],
)
def test_rows_that_are_none_are_refused_with_their_line(line, message, tmp_path):
    path = tmp_path / "raw.jsonl"
    begin(path, setup_of([fake(OURS)]))
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ConfigError, match=message):
        read(path)


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_first_difference(one, other):
    index = same_tokens(one, other)
    if index is None:
        assert one == other
    else:
        assert one[:index] == other[:index] and one[index : index + 1] != other[index : index + 1]


@settings(max_examples=25)
@given(st.data())
def test_rows_come_back_as_they_were(data):
    seconds = data.draw(st.just(0.0) | st.floats(1e-9, 1e9))
    row = answered("b", data.draw(st.integers(0, 9)), 0, seconds)
    row = dataclasses.replace(row, texts=[data.draw(st.text())])
    path = Path(f"/tmp/offload-rt-rows-{os.getpid()}.jsonl")
    try:
        begin(path, setup_of([fake(OURS)])).append(row)
        assert read(path).rows == [row]
    finally:
        path.unlink()


# What keeps memory and the page cache in bounds.


def run_below(cap, source):
    done = subprocess.run(
        cap.command([sys.executable, "-c", source]), capture_output=True, text=True, check=False
    )
    struck = cap.struck()
    cap.close()
    return done, struck


def test_a_group_ends_what_exceeds_it_and_counts_the_page_cache(tmp_path):
    kind = find_cap(64 * MIB)
    if not isinstance(cap := kind.open(), GroupCap):
        cap.close()
        pytest.skip("no memory cgroup can be made here")
    done, struck = run_below(cap, "x = bytearray(200 * 2**20)")
    assert (done.returncode, struck) == (-9, True)
    assert not cap.folder.exists()
    big = written(tmp_path / "big", os.urandom(MIB) * 128)
    pagecache.drop([big])
    source = f"f = open({str(big)!r}, 'rb')\nwhile f.read(2**20): pass"
    done, struck = run_below(kind.open(), source)
    assert (done.returncode, struck) == (0, False)
    assert pagecache.cached_bytes([big]) <= 64 * MIB  # what is above the limit was dropped again


def written(path, data):
    """A file that is on the disk: dirty pages cannot be dropped."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def test_an_engine_killed_by_the_cap_says_so(tmp_path):
    kind = find_cap(96 * MIB)
    if not kind.counts_page_cache:
        pytest.skip("no memory cgroup can be made here")
    one = comparison(tmp_path, [fake(OURS), fake("b", "hungry@load")])
    one.cap = kind
    one.run(1)
    (failed,) = one.raw.failures()
    assert (failed.run.engine, failed.reason) == ("b", "killed by the memory cap")


def test_where_no_group_can_be_made_private_memory_is_limited():
    done, struck = run_below(DataLimit(256 * MIB), "x = bytearray(400 * 2**20)")
    assert done.returncode == 1 and "MemoryError" in done.stderr and not struck
    done, _ = run_below(DataLimit(256 * MIB), "x = bytearray(50 * 2**20)")
    assert done.returncode == 0


def test_the_next_best_way_is_taken_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_rt.baselines.cap._parents", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "RLIMIT_DATA" in find_cap(64 * MIB).words
    tool = tmp_path / "systemd-run"
    tool.write_text(
        '#!/bin/sh\nfor a; do case "$a" in MemoryMax=67108864) found=1;; esac; done\n'
        'test "$found" || exit 9\nwhile [ "$1" != -- ]; do shift; done\nshift; exec "$@"\n'
    )
    tool.chmod(0o755)
    kind = find_cap(64 * MIB)
    assert "systemd-run" in kind.words and isinstance(kind.open(), ScopeCap)
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert "RLIMIT_DATA" in find_cap(64 * MIB).words
    assert find_cap(None).words == "none"


def test_dropped_files_leave_the_page_cache(tmp_path):
    file = written(tmp_path / "file", b"x" * MIB)
    assert pagecache.cached_bytes([file]) == MIB
    pagecache.drop([file])
    if pagecache.cached_bytes([file]) == MIB:
        pytest.skip("this file system lives in the page cache")
    assert pagecache.cached_bytes([file]) == 0
    empty = tmp_path / "empty"
    empty.touch()
    assert pagecache.cached_bytes([empty]) == 0


# Workers.

HARNESSED = """
import os, sys
from offload_rt.baselines.workers.harness import serve
print("a library's greeting")
os.write(1, b"from C\\n")
class Engine:
    def load(self, settings):
        print("loading", settings["model"])
        if settings["model"] == "bad": sys.exit("no model")
        return {"threads": 1}
    def answer(self, prompts, max_tokens, end_tokens, clock):
        clock.tick(0)
        data = bytearray(os.urandom(2**20)) * 64
        for n in range(1, max_tokens + 1): clock.tick(n * len(prompts))
        return [[7] * max_tokens for _ in prompts]
    def gap(self, ids, tokens): return {"logits": [1.0, 0.5], "best": 3}
    def device_peak_bytes(self): return None
    def link_bytes(self): return 12
sys.exit(serve(Engine()))
"""


@pytest.fixture
def harnessed(tmp_path):
    environment = dict(os.environ) | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", HARNESSED]
    with Worker(command, environment, find_cap(None).open(), tmp_path / "log") as worker:
        yield worker


def test_what_libraries_print_does_not_disturb_replies(harnessed, tmp_path):
    loaded = harnessed.request({"do": "load", "model": "m"}, 20)
    assert loaded["facts"] == {"threads": 1} and loaded["load_s"] >= 0
    ask = {"do": "answer", "prompts": [[1], [2]], "max_tokens": 3, "end_tokens": []}
    reply = harnessed.request(ask, 20)
    assert reply["token_ids"] == [[7] * 3] * 2
    assert (reply["first_tokens"], reply["passes"], reply["decode_link_bytes"]) == (2, 3, 0)
    assert reply["host_peak_bytes"] > 64 * MIB
    assert reply["device_peak_bytes"] >= 60 * MIB  # what came after loading
    log = (tmp_path / "log").read_text()
    assert "a library's greeting" in log and "from C" in log and "loading m" in log


def test_a_load_that_exits_is_an_answer(harnessed):
    with pytest.raises(WorkerFailedError, match="SystemExit: no model"):
        harnessed.request({"do": "load", "model": "bad"}, 20)


def test_other_engines_run_with_the_libraries_as_the_user_has_them(tmp_path, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(system, "_settled", set())  # the tests' own process has settled some
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")  # the user's own
    system.settle_math()
    seen = {spec.name: _environment(spec, tmp_path / "python", tmp_path) for spec in KNOWN.values()}
    ours = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LRU_CACHE_CAPACITY"}
    for name, values in seen.items():
        assert values["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
        assert ours & set(values) == (ours if name in (OURS, DRAFTED) else set()), name


def test_workers_of_other_environments_need_nothing_of_ours():
    files = [PACKAGE / "__init__.py", PACKAGE / "baselines" / "__init__.py"]
    files += [f for f in (PACKAGE / "baselines/workers").glob("*.py") if "offload_rt" not in f.name]
    assert len(files) >= 8
    for path in files:
        tree = ast.parse(path.read_text())
        for check in [n for n in tree.body if isinstance(n, ast.If)]:
            if ast.unparse(check.test) == "TYPE_CHECKING":  # never run
                tree.body.remove(check)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("offload_rt"):
                assert node.module.startswith("offload_rt.baselines.workers."), path
            assert not (isinstance(node, ast.Import) and "offload_rt" in node.names[0].name), path


# How ZeRO-Inference's memory is spent.


@given(
    device=st.integers(0, 2**33),
    cap=st.none() | st.integers(2**20, 2**34),
    used=st.integers(0, 2**31),
    layer=st.integers(MIB, 2**28),
    tensors=st.integers(1, 20),
    offload=st.sampled_from(["cpu", "nvme"]),
    on_cpu=st.booleans(),
)
def test_zero_never_keeps_more_than_it_may(device, cap, used, layer, tensors, offload, on_cpu):
    asked = {
        "item_bytes": 2,
        "largest_layer_bytes": layer,
        "largest_layer_tensor_bytes": layer // 2,
        "tensors_per_layer": tensors,
        "device_bytes": device,
        "kv_bytes": 10 * MIB,
        "cap_bytes": cap,
        "device": "cpu" if on_cpu else "cuda:0",
        "dtype": "bfloat16",
        "scratch": "/s",
        "offload": offload,
    }
    found = spend(asked, used)
    kept, live = 2 * found.kept_elements, 2 * found.live_elements
    assert live >= 2 * layer and 2 * found.buffer_elements >= layer // 2
    assert kept == 0 or kept + live + 10 * MIB <= device
    if on_cpu and cap is not None and kept:
        buffers = 2 * found.buffer_elements * found.buffers if offload == "nvme" else 0
        assert used + kept + buffers <= cap
    zero = zero_config(asked, found)["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] * 2 >= 2 * layer
    assert zero["stage3_max_live_parameters"] * 2 >= kept + live
    assert json.dumps(zero) and zero["offload_param"]["device"] == offload
    # its own way of keeping parameters is for GPUs only, see run_deepspeed.py
    assert (zero["stage3_param_persistence_threshold"] > 0) == (not on_cpu and kept > 0)
