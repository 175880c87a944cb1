"""`offload-run compare`: its options, report and Ctrl-C; the real workers of our environment."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import Forked
from waits import wait_until

from offload_rt.baselines import engines, process
from offload_rt.baselines.engines import EngineSpec
from offload_rt.cli import compare as verb
from offload_rt.cli import compare_chart, compare_report
from offload_rt.cli.held import held
from offload_rt.config import DraftConfig, RuntimeConfig

FAKE = Path(__file__).with_name("fake_worker.py")


@pytest.fixture
def charts():
    """They are drawn."""


@pytest.fixture
def fakes(request, monkeypatch):
    """Engines `good`, `other`, ... that compute nothing; ours is one of them.

    A chart takes longer than their processes: only who looks for one has it drawn.
    """
    if "charts" not in request.fixturenames:
        monkeypatch.setattr(verb, "draw", lambda *_: None)
    for name in ("offload-rt", "offload-rt+draft", "good", "slow", "other", "crash", "hang"):
        behaviour = "good" if name.startswith("offload-rt") else name
        spec = EngineSpec(
            name=name, arguments=("-S", str(FAKE), behaviour), environment=name, module="json"
        )
        monkeypatch.setitem(engines.KNOWN, name, spec)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "the quick fox"}\n{"prompt": "a lazy dog | and more"}\n')
    return path


@pytest.fixture
def compare(offload_run, tiny_model, questions, tmp_path):
    def call(*more, output="out", memory="256MiB"):
        base = ("compare", tiny_model, "--prompts", questions, "-n", 6, "--rounds", 2)
        return offload_run(
            *base,
            "--device-memory",
            memory,
            "--output",
            tmp_path / output,
            "--device",
            "cpu",
            *more,
        )

    return call


def sections(markdown):
    parts = re.split(r"^## (.*)$", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows_of(section):
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def test_a_comparison_goes_on_with_the_same_placement_only(compare, fakes):
    assert compare("--against", "good").code == 0
    done = compare("--against", "good", "--slots", "2")
    assert done.code == 2
    assert "another comparison (its options for memory and placement are others)" in done.err


def test_a_folder_is_written_by_one_comparison_at_a_time(compare, fakes, tmp_path):
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out", "--output"):
        done = compare("--against", "good")
        assert done.code == 2 and "another run is writing in" in done.err
        assert not list((tmp_path / "out").iterdir())
    assert compare("--against", "good").code == 0


def test_sizes_are_those_of_the_format_computed_in(compare, fakes, tmp_path, monkeypatch):
    seen = {}
    for dtype in ("bfloat16", "float32"):
        monkeypatch.setenv("FAKE_LOAD", str(tmp_path / dtype))
        assert compare("--against", "good", "--dtype", dtype, output=f"out-{dtype}").code == 0
        seen[dtype] = json.loads((tmp_path / dtype).read_text())
    for size in ("item_bytes", "largest_layer_bytes", "largest_layer_tensor_bytes", "kv_bytes"):
        assert seen["float32"][size] == 2 * seen["bfloat16"][size] > 0


def test_nothing_measured_is_no_success(compare, fakes, monkeypatch):
    ours = dataclasses.replace(engines.KNOWN["crash"], name="offload-rt")
    monkeypatch.setitem(engines.KNOWN, "offload-rt", ours)
    done = compare("--against", "crash")
    assert done.code == 2 and "Nothing was measured." in done.out
    assert "nothing was measured: offload-rt: ended with exit code 1" in done.err


def test_the_report_and_its_files(compare, fakes, tmp_path, tiny_model):
    done = compare("--against", "slow,other,crash", "--batch", "2,1", "--draft", "auto")
    assert done.code == 0
    assert "crash, batch 1: not run (warm-up: ended with exit code 1" in done.err
    out = tmp_path / "out"
    assert (out / "report.md").read_text() == done.out
    found = sections(done.out)
    assert done.out.startswith(f"# offload-run compare: {tiny_model.name}\n")
    for fact in (
        "device memory: 256 MiB",
        "memory cap: 2.25 GiB",
        "prompts: 2 of questions.jsonl",
        "answers: up to 6 tokens, greedy",
        "batch sizes: 1, 2",
        "offload-rt+draft: --draft auto, as many tokens as are measured to pay; "
        "batch 1 auto, 8 at first; batch 2 auto, 8 at first",
        "dropped from it before each process",
    ):
        assert fact in done.out
    table = rows_of(found["Engines"])
    order = ["offload-rt", "offload-rt+draft", "slow", "other"]
    assert [(row[0], row[1], row[2]) for row in table] == [
        (name, batch, "2") for batch in ("1", "2") for name in order
    ]
    slow = table[2]
    assert slow[3:7] == ["1.000", "1.00", "2.00", "2.00"]
    assert [row[-1] for row in table[:4]] == ["-", "2 of 2", "2 of 2", "0 of 2"]
    assert [row[:3] for row in rows_of(found["Not run"])] == [
        ["crash", "1", "1"],
        ["crash", "2", "1"],
    ]
    assert rows_of(found["Most tokens a second"])[1][0] == "2"
    differences = rows_of(found["Different texts"])
    assert {(row[0], row[1], row[3]) for row in differences} == {("other", b, "2") for b in "12"}
    assert all(row[-1] == "16.000, 15.875, near" for row in differences)
    assert "ZeRO-Inference" in found["Fairness"] and "large batches" in found["Fairness"]
    record = json.loads((out / "report.json").read_text())
    assert [(e["engine"], e["batch"]) for e in record["engines"]] == [
        (r[0], int(r[1])) for r in table
    ]
    assert record["failed"][0]["reason"].endswith("ValueError: no such layer")
    assert sorted(p.name for p in (out / "logs").iterdir())[0].startswith("crash-batch1-round1")


def test_weights_that_were_in_memory_are_reported(compare, fakes, offload_run, tmp_path):
    assert "## Doubtful" not in compare("--against", "slow").out
    path = tmp_path / "out" / "raw.jsonl"
    setup, *rows = map(json.loads, path.read_text().splitlines())
    for row in rows:
        if row["run"]["engine"] == "slow":
            row |= {"cached_bytes": setup["weights_bytes"]} if row["kind"] == "loaded" else {}
            row["host_peak_bytes"] = setup["cap_bytes"] + 1
    path.write_text("".join(json.dumps(line) + "\n" for line in (setup, *rows)))
    doubtful = sections(offload_run("compare", "--report-only", path.parent).out)["Doubtful"]
    assert "- slow, batch 1 had 2.25 GiB in memory, more than the cap" in doubtful
    assert "- slow, batch 1 began with" in doubtful and "offload-rt" not in doubtful


def test_report_only_makes_the_same_report(compare, fakes, offload_run, tmp_path):
    done = compare("--against", "slow,crash")
    out = tmp_path / "out"
    kept = {name: (out / name).read_bytes() for name in ("report.md", "report.json")}
    for name in kept:
        (out / name).unlink()
    again = offload_run("compare", "--report-only", out)
    assert (again.code, again.out) == (0, done.out)
    assert kept == {name: (out / name).read_bytes() for name in kept}
    with (out / "raw.jsonl").open("ab") as file:
        file.write(b'{"kind"')
    torn = offload_run("compare", "--report-only", out)
    assert (torn.code, torn.out) == (0, done.out) and "has no end and is left out" in torn.err
    assert json.loads(offload_run("compare", "--report-only", out, "--json").out)["rows"] == 14


def test_ctrl_c_keeps_the_rows_and_the_same_command_goes_on(compare, fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))

    def interrupt():
        wait_until((tmp_path / "pids").exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = compare("--against", "slow,hang")
    thread.join()
    assert done.code == 130
    assert "interrupted: 7 rows are in" in done.err and "Traceback" not in done.err
    assert [row[0] for row in rows_of(sections(done.out)["Engines"])] == ["offload-rt", "slow"]
    pid = (tmp_path / "pids").read_text().split()[0]
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "out" / ".offload-run-scratch").exists()
    monkeypatch.setitem(engines.KNOWN, "hang", engines.KNOWN["good"])
    more = compare("--against", "slow,hang")
    assert more.code == 2 and "its engines are others" in more.err
    spec = engines.KNOWN["good"]
    mended = EngineSpec(name="hang", arguments=spec.arguments, environment="", module="json")
    monkeypatch.setitem(engines.KNOWN, "hang", mended)
    more = compare("--against", "slow,hang")
    assert more.code == 0
    assert [row[2] for row in rows_of(sections(more.out)["Engines"])] == ["2", "2", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "vllm"], "--against vllm is not known: use deepspeed, "),
        (["--against", "offload-rt"], "--against offload-rt is not known"),
        (["--against", "transformers-assisted"], "needs a --draft model:MODEL"),
        (["--batch", "1,x"], "--batch is 1,x, accepted are numbers from 1 to 1024"),
        (["--batch", "0"], "--batch is 0"),
        (["--memory-cap", "100MiB"], "--memory-cap is 100 MiB, on the CPU --device-memory"),
        (["-n", "1"], "--max-tokens is 1, accepted is 2 or more"),
        (["-n", "9999"], "the longest prompt has"),
        (["--engine-python", "deepspeed"], "--engine-python is deepspeed, accepted is ENGINE=PATH"),
        (["--engine-python", "deepspeed=/no"], "/no is no program that can be run"),
        (["--engine-python", "x=/bin/sh"], "--engine-python x=... has no effect: compared are"),
        (["--rounds", "0"], "--rounds"),
        (["--timeout", "0"], "--timeout"),
        (["--draft", "what"], "--draft what is not known"),
        (["--report-only", "x"], "--report-only needs the rows of its folder only"),
    ],
)
def test_bad_usage(arguments, message, compare):
    done = compare(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and "Traceback" not in done.err
    assert done.err.count("\n") <= 4


@pytest.mark.parametrize("missing", ["--output", "--prompts", "--device-memory", "MODEL"])
def test_what_is_missing_is_named(missing, offload_run, tiny_model, questions, tmp_path):
    given = {"--output": tmp_path, "--prompts": questions, "--device-memory": "1GiB"}
    arguments = [part for flag, value in given.items() if flag != missing for part in (flag, value)]
    model = [] if missing == "MODEL" else [tiny_model]
    done = offload_run("compare", *model, *arguments)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(rf"offload-run: error: {missing} is missing: [^\n]+\n", done.err)


def test_a_folder_without_rows_is_refused(offload_run, tmp_path):
    done = offload_run("compare", "--report-only", tmp_path)
    assert done.code == 2 and re.search(r"cannot read .*raw.jsonl: No such file", done.err)
    (tmp_path / "raw.jsonl").touch()
    done = offload_run("compare", "--report-only", tmp_path)
    assert done.code == 2 and "has no rows: run the comparison first" in done.err


def test_the_chart(compare, fakes, charts, tmp_path):
    pytest.importorskip("matplotlib")
    done = compare("--against", "slow", "--batch", "1,2")
    assert (done.code, "no chart" in done.err) == (0, False)
    assert (tmp_path / "out" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_note_and_no_chart(
    compare, fakes, charts, tmp_path, monkeypatch
):
    find = compare_chart.importlib.util.find_spec
    monkeypatch.setattr(
        compare_chart.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find(n)
    )
    done = compare("--against", "", "--draft", "ngram")
    assert done.code == 0 and "no chart: matplotlib is not installed" in done.err
    assert not (tmp_path / "out" / "chart.png").exists()


def test_our_worker_plans_who_drafts_where_that_is_left_open(tiny_model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup2", lambda *_: None)  # stdout stays the tests'
        from offload_rt.baselines.workers.harness import Clock
        from offload_rt.baselines.workers.run_offload_rt import OffloadRt

    runtime = RuntimeConfig(device="cpu", device_limit_bytes=80 * 2**20, resident_layers=1)
    room = {"batch": 2, "longest_tokens": 40, "prompt_tokens": 48, "runtime": asdict(runtime)}
    seen = []
    for name in ("auto", "none"):
        worker = OffloadRt()
        draft = asdict(DraftConfig(draft=name))
        config = worker.load({"model": str(tiny_model), "draft": draft, **room})["config"]
        seen.append((config, worker.answer([[5, 6, 7] * 8] * 2, 9, frozenset(), Clock(worker))))
        worker.engine.close()
    (planned, tokens), (plain, wanted) = seen
    assert (planned["draft"]["draft"], plain["draft"]["draft"]) == ("ngram", "none")
    assert planned["first_draft_tokens"] > 0 == plain["first_draft_tokens"]
    assert tokens == wanted


def started(command, **options):
    """Our Python is started, below the cap; those of others are forks, which import nothing."""
    if "offload_rt.baselines.workers.run_offload_rt" in command:
        return subprocess.Popen(command, **options)
    return Forked(command[command.index(sys.executable) :], **options)


def test_the_real_engines_of_this_environment_write_the_same_text(compare, tmp_path, monkeypatch):
    """fp32, prompts of two lengths as one batch; accelerate keeps some modules on disk."""
    monkeypatch.setattr(engines, "baselines_folder", lambda: tmp_path)
    known = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=started, **known))
    done = compare(
        "--against", "accelerate,transformers,deepspeed-nvme", "--rounds", 1, "--batch", 2,
        memory="128.4MiB",
    )  # fmt: skip
    assert done.code == 0, done.err
    table = rows_of(sections(done.out)["Engines"])
    assert [row[0] for row in table] == ["offload-rt", "accelerate", "transformers"], done.out
    assert [row[-1] for row in table[1:]] == ["2 of 2"] * 2
    ((name, *_, reason),) = rows_of(sections(done.out)["Not run"])
    assert name == "deepspeed-nvme" and "tools/setup_baselines.sh" in reason
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "disk" in record["configurations"]["accelerate, batch 2"]["config"]["modules"]


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        ({}, "not planned"),  # it failed before
        ({"config": {"draft": {"draft": "ngram"}}}, "ngram"),  # of an edition that did not say
        ({"config": {"draft": {"draft": "ngram"}, "first_draft_tokens": 4}}, "ngram, 4 at first"),
    ],
)
def test_who_drafted_is_named_as_far_as_it_is_known(facts, shown):
    assert compare_report._settled(facts) == shown
