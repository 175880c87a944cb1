"""`tools/validate_pools.py`: what is learnt by one run, and nothing later, is what plans know."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from tool_runs import loaded


@pytest.fixture(scope="module")
def tool():
    with loaded("validate_pools") as module:
        yield module


def test_each_size_is_planned_with_what_the_first_run_learnt(tool, monkeypatch, tmp_path, capsys):
    said = []

    def run(command, env, **_):
        verb, memory = command[3], command[command.index("--device-memory") + 1]
        known = tool.Path(env["XDG_DATA_HOME"]) / "offload-rt" / "levels.json"
        known.parent.mkdir(exist_ok=True)
        said.append((verb, memory, known.read_text() if known.exists() else ""))
        if verb == "generate":
            known.write_text(memory)
            made = {"timings": {"s_per_token": 1.1 if memory == "2GiB" else 3.0}}
        else:
            predicted = {"s_per_token": 1.0, "compute_s": 0.5, "stall_s": 0.5}
            made = {"predicted": predicted, "levels": {"reading": 1.5, "computing": 2.0}}
        return SimpleNamespace(stdout=json.dumps(made))

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "said.jsonl"
    monkeypatch.setattr(
        tool.sys,
        "argv",
        ["x", "easy", "--first", "3GiB", "--sizes", "2GiB,4GiB", "--output", str(out)],
    )
    assert tool.main() == 0
    assert said == [
        ("generate", "3GiB", ""),
        *((verb, size, "3GiB") for size in ("2GiB", "4GiB") for verb in ("plan", "generate")),
    ]
    shown = capsys.readouterr().out
    assert "| easy | 2GiB | 1.000 | 1.100 | 1.10 |" in shown and "computing 2.00" in shown
    assert "1 of 2 within 15 %" in shown and len(out.read_text().splitlines()) == 2
