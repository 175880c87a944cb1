"""`tools/gpu_check.py`: parts run on the CPU, one that fails stops nothing, and the summary."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from tool_runs import TOOLS, loaded

import offload_rt
from offload_rt.device.cpu import CpuDevice

# What a machine with a GPU may lack (docs: tools/gpu_check.sh).
ABSENT = {"accelerate", "gguf", "matplotlib", "peft", "platformdirs", "prompt_toolkit", "pynvml"}
TERMINAL = {"chat_terminal.py"}  # imported by a chat on a terminal alone


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    with loaded("gpu_check") as module:
        yield module
    for name in [name for name in sys.modules if name.startswith("gpu_check_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "part",
    ["machine", "laws", "link", "streaming", "drafts", "launches", "graphs", "formats", "kv"],
)
def test_a_part_runs_on_the_cpu(check, tmp_path, part):
    import gpu_check_parts

    out = tmp_path / "facts.jsonl"
    gpu_check_parts.run(part, "cpu", out)
    facts = check.read_facts(out)
    assert facts and {fact["part"] for fact in facts} == {part}
    laws = [fact for fact in facts if "held" in fact]
    assert all(fact["held"] for fact in laws)
    assert part != "laws" or len(laws) >= 17


def test_graphs_are_checked_over_the_double_and_a_wrong_one_is_found(
    check, tmp_path, recording, monkeypatch
):
    import gpu_check_parts

    for wrong in (False, True):
        out = tmp_path / f"{wrong}.jsonl"
        if wrong:  # as after a refusal: nothing was captured
            monkeypatch.setattr(CpuDevice, "record", lambda device, work, vary: None)
        gpu_check_parts.run("graphs", "cpu", out)
        facts = check.read_facts(out)
        held = [fact["held"] for fact in facts if "held" in fact]
        assert len(held) == 4 and held[:3] == [True] * 3 and held[3] is not wrong
        (chain,) = [fact for fact in facts if "as_one_by_one" in fact]
        assert chain["as_one_by_one"] == (0 if wrong else chain["tokens"])
        (one,) = [fact for fact in facts if fact["fact"].endswith(", 1 rows")]
        assert one["recorded_s"] > 0 and one["eager_s"] > 0
    assert recording["replayed"] > 40


def test_a_model_drafts_more_of_what_its_later_layers_add_less_to(check, tmp_path):
    import gpu_check_parts as parts
    from gpu_check_models import Made

    rates = []
    for late in (1.0, 0.3, 0.0):
        bench = parts.Bench("laws", "cpu", tmp_path / "facts", tmp_path / str(late))
        made = Made(late=late)
        target, first = bench.made("target", made), bench.made("first", made, made.first)
        draft = parts.DraftConfig(draft=f"model:{first}", draft_tokens=4)
        prompt = parts.text_of(40, made.vocab)
        with parts.engine_of(bench, target, prompt, 40, {"draft": draft}) as engine:
            rates.append(parts.finished(engine, prompt, 40).report().speculation.acceptance_rate)
    assert rates[0] < rates[1] < rates[2] == 1.0


def test_a_part_that_fails_or_hangs_stops_nothing(check, tmp_path, monkeypatch, capsys):
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\ncase $3 in kv) sleep 60;; link) exit 7;; esac\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    out = tmp_path / "facts.jsonl"
    arguments = ["--device", "cpu", "--parts", "kv,link,laws", "--limit", "0.5", "--out", str(out)]
    assert check.main(arguments) == 1
    ends = {fact["part"]: fact["how"] for fact in check.read_facts(out)}
    assert ends == {"kv": "time is over", "link": "7", "laws": "0"}
    said = capsys.readouterr().out
    assert "FAILED part kv: time is over" in said and "FAILED part link: 7" in said


def test_results_of_the_suite_are_told_as_they_come(check, tmp_path):
    """What passes, fails, hangs, lacks a fixture and cannot be collected, then what kills it."""
    (tmp_path / "test_one.py").write_text(
        "import os, time\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_hangs(): time.sleep(60)\n"
        "def test_lacks(nothing): pass\n"
        "def test_passes_too(): pass\n"
        "def test_dies(): os._exit(9)\n"
        "def test_never_runs(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    out = tmp_path / "facts.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", tmp_path]
    command += ["-pno:xdist", "-pno:cacheprovider", "-pgpu_check_suite"]
    command += [f"--facts={out}", "--test-seconds=0.5"]
    paths = os.pathsep.join([str(TOOLS), str(TOOLS.parent)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 9, done.stdout
    facts = {fact["fact"].rpartition("test_")[2]: fact for fact in check.read_facts(out)}
    assert {name: fact["held"] for name, fact in facts.items()} == {
        "broken.py": False,
        "passes": True,
        "fails": False,
        "hangs": False,
        "lacks": False,
        "passes_too": True,
    }
    assert "not done after 0.5 s" in facts["hangs"]["why"] and "1 == 2" in facts["fails"]["why"]


def test_the_summary_names_broken_laws_and_predictions(check, tmp_path):
    out, said = tmp_path / "facts.jsonl", []
    check.tell(out, "laws", "this one", held=True)
    check.tell(out, "laws", "that one", held=False, why="2 differ")
    check.tell(out, "plan", "seconds", measured=1.5, predicted=1.0)
    assert not check.summarise(check.read_facts(out), said.append)
    assert said[0] == "1 of 2 laws held"
    assert any("BROKEN laws: that one: 2 differ" in line for line in said)
    assert any("1.5 measured, 1 predicted (+50%)" in line for line in said)
    assert check.summarise([{"part": "laws", "fact": "a", "held": True}], said.append)
    assert not check.summarise([], said.append)  # nothing checked is not well


def test_without_a_gpu_it_says_so(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(subprocess, "run", forks.run)  # torch asks the driver, not when imported
    assert check.main(["--out", str(tmp_path / "facts")]) == 3
    assert "no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check.main(["--parts", "laws,none"])


def test_no_question_about_a_gpu_is_of_the_first_whatever_is_checked():
    for file in TOOLS.glob("gpu_check*.py"):
        asked = set(re.findall(r"torch\.cuda\.(\w+)\(\)", file.read_text()))
        assert asked <= {"is_available", "device_count", "empty_cache"}, file.name


def test_the_parts_fit_in_the_time_that_a_gpu_is_lent(check):
    assert sum(check.LIMITS_S.values()) <= 8 * 60


def test_nothing_that_such_a_machine_lacks_is_imported_at_the_start():
    """Imports at the top of a module, outside `try`."""
    found = []
    for file in Path(offload_rt.__file__).parent.rglob("*.py"):
        text = file.read_text()
        for node in ast.parse(text).body if any(name in text for name in ABSENT) else ():
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            lacking = ABSENT & {name.partition(".")[0] for name in names}
            found += [(file.name, name) for name in lacking]
    assert {name for name, _ in found} <= TERMINAL
